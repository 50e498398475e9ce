"""Checks of a recipe before anything is built, and of a fit before it counts as finished."""

from __future__ import annotations

import os
from typing import Any

import lightning as L

from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.errors import UserError, user_errors
from lit_unlearn.system.names import check_path
from lit_unlearn.system.run_file import checkpoint_of


def check_that_it_edits(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse a fit that has changed nothing.

    Raises:
        UserError: Every edited weight is bit for bit the same as in the base model.
    """
    if isinstance(module, DiffusionEditor) and module.pretrained.unchanged():
        raise UserError(
            f"fit: the edit changes nothing: after {trainer.global_step} steps all {len(module.edited_names)} edited "
            f"weights are those of {module.model_id} bit for bit, so take more steps, a larger learning rate or a "
            "smaller ridge."
        )


def as_list(value: Any) -> list[Any]:
    """The value of an option that takes one item or a list, as a new list; empty if it has no value."""
    return list(value) if isinstance(value, list) else [value] if value else []


def check_paths(config: Any) -> None:
    """Expand ``~`` in the paths of a command's configuration, and check the name of the folder for runs.

    Raises:
        UserError: A folder cannot have that name.
    """
    for owner, key in ((config, "ckpt_path"), (config.trainer, "default_root_dir")):
        if isinstance(path := owner.get(key), str | os.PathLike):
            owner[key] = os.path.expanduser(path)
    if isinstance(path := config.get("ckpt_path"), str | os.PathLike):
        config["ckpt_path"] = str(checkpoint_of(path))  # of a run's folder
    with user_errors():
        check_path("trainer.default_root_dir", config.trainer.default_root_dir or ".")


def fetch_base(module: L.LightningModule) -> None:
    """Download and check the base model before the run's folder is made: a model may be missing on the hub.

    Raises:
        UserError: As ``BaseModel.fetch``; or the method cannot edit the model's weights.
    """
    if isinstance(module, DiffusionEditor) and module.base.folder is None:
        with user_errors():
            module.base.fetch()
            module.select(module.base.names)


def check_edit(method: type, edit: Any, callbacks: Any) -> None:
    """Refuse a closed-form method without a solver, and a solver for a method that trains its weights.

    Args:
        method: Class of the method.
        edit: The recipe's ``edit``, or None.
        callbacks: Callbacks of the recipe's trainer; a ``ClosedFormEdit`` among them also has a solver.

    Raises:
        UserError: Method and solver do not fit together.
    """
    named = [callbacks] if callbacks is not None and not isinstance(callbacks, list) else callbacks or []
    given = edit is not None or any(str(one.get("class_path", "")).endswith("ClosedFormEdit") for one in named)
    if issubclass(method, ClosedFormMethod) and not given:
        raise UserError(
            f"fit: {method.__name__} finds what to write, and nothing in the recipe writes it: add the key edit, "
            "such as edit: {class_path: NullSpace}, or pass --edit NullSpace."
        )
    if not issubclass(method, ClosedFormMethod) and edit is not None:
        raise UserError(f"fit: edit has no effect on {method.__name__}, which trains its weights: leave it out.")
