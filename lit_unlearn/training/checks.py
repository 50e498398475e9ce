"""What is refused of a recipe before anything is built, and of a fit before it is called finished."""

from __future__ import annotations

import os
from typing import Any

import lightning as L

from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.errors import UserError, user_errors
from lit_unlearn.system.names import check_path


def check_that_it_edits(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to call a fit finished that has changed nothing.

    Raises:
        UserError: Every edited weight is that of the base model, bit for bit.
    """
    if isinstance(module, DiffusionEditor) and module.pretrained.unchanged():
        raise UserError(
            f"fit: the edit changes nothing: after {trainer.global_step} steps all {len(module.edited_names)} edited "
            f"weights are those of {module.model_id} bit for bit, so take more steps, a larger learning rate or a "
            "smaller ridge."
        )


def as_list(value: Any) -> list[Any]:
    """What an option of one or several has: a list of its own; empty for none."""
    return list(value) if isinstance(value, list) else [value] if value else []


def check_paths(config: Any) -> None:
    """Let ``~`` be the home folder in the paths of a command's configuration, and check where runs are to lie.

    Raises:
        UserError: The folder cannot have that name.
    """
    for owner, key in ((config, "ckpt_path"), (config.trainer, "default_root_dir")):
        if isinstance(path := owner.get(key), str | os.PathLike):
            owner[key] = os.path.expanduser(path)
    with user_errors():
        check_path("trainer.default_root_dir", config.trainer.default_root_dir or ".")


def fetch_base(module: L.LightningModule) -> None:
    """Have the base model at hand, checked, before the run has a folder: one of the hub may not be there.

    Raises:
        UserError: As ``BaseModel.fetch``; or the method cannot edit its weights.
    """
    if isinstance(module, DiffusionEditor) and module.base.folder is None:
        with user_errors():
            module.base.fetch()
            module.select(module.base.names)


def check_edit(method: type, edit: Any, callbacks: Any) -> None:
    """Refuse a method that a closed form writes and a recipe without one, and the other way round.

    Args:
        method: Class of the method.
        edit: The recipe's ``edit``, or None.
        callbacks: Those of the recipe's trainer, which may have a ``ClosedFormEdit`` of their own.

    Raises:
        UserError: They do not belong together.
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
