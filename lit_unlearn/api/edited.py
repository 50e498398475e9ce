"""An edit as the user of Python holds it: the file that a fit has written, read once."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.system.errors import plain_warnings, user_errors
from lit_unlearn.system.run_file import check_checkpoint, checkpoint_of

if TYPE_CHECKING:
    from torch import Tensor

    from lit_unlearn.data.concepts import ConceptSet
    from lit_unlearn.diffusion.pipeline import Pipeline
    from lit_unlearn.edits.checkpoint import Edit as ReadEdit

Place = str | os.PathLike[str]
"""A path."""


class Edit:
    """An edited model: what a fit has written.

    Args:
        path: A run's folder, its checkpoint, or a delta.

    Raises:
        UserError: There is no such file, or it was not made by lit-unlearn.
    """

    content: ReadEdit
    """What the file holds."""

    def __init__(self, path: Place) -> None:
        with user_errors():
            check_checkpoint(os.fspath(path))
            from lit_unlearn.edits.checkpoint import read_edit  # takes seconds

            self.content = read_edit(checkpoint_of(Path(path).expanduser()))

    def __repr__(self) -> str:
        return f"Edit({str(self.path)!r}): {self.method}, {', '.join(self.concepts) or 'no concept'}"

    @property
    def path(self) -> Path:
        """The checkpoint or the delta."""
        return self.content.path

    @property
    def folder(self) -> Path | None:
        """The run's folder; None for a file that lies elsewhere."""
        return self.content.run_folder

    @property
    def concepts(self) -> list[str]:
        """Names of the edited concepts."""
        return list(self.content.concepts)

    @property
    def method(self) -> str:
        """Name of the method's class."""
        return self.content.method

    @property
    def model(self) -> str:
        """The model that was edited: a folder, a file or a hub id."""
        return self.content.model

    @property
    def weights(self) -> dict[str, Tensor]:
        """The new values of the edited weights, by full name."""
        return dict(self.content.weights)

    @cached_property
    def concept_set(self) -> ConceptSet:
        """The concept set that the edit was made with.

        Raises:
            UserError: Its file has changed since.
        """
        from lit_unlearn.edits.judging import concept_set_of_edit

        with user_errors():
            return concept_set_of_edit(self.content)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What the method reports about its edit, such as the null space of each layer; empty for a delta."""
        if self.path.suffix == ".safetensors":
            return {}
        from lit_unlearn.edits.checkpoint import load_checkpoint
        from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

        with user_errors():
            return dict(load_checkpoint(self.path)[CHECKPOINT_KEY]["report"])

    @property
    def scores(self) -> dict[str, Any] | None:
        """The content of the run's ``scores.json``; None if it was not scored.

        Raises:
            UserError: The file cannot be read.
        """
        from lit_unlearn.evaluation.scores import Scores

        path = None if self.folder is None else self.folder / "scores.json"
        if path is None or not path.exists():
            return None
        with user_errors():
            return Scores.load(path).to_dict()

    def pipeline(self, model: Place | None = None, device: str | None = None) -> Pipeline:
        """Load the edited model.

        Args:
            model: The model that was edited, if a delta does not say where it lies.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.

        Raises:
            UserError: The model is not there, or is not the one that was edited.
        """
        from lit_unlearn.edits.base import chosen_base
        from lit_unlearn.edits.checkpoint import load_edited, warn_unfinished
        from lit_unlearn.system.devices import find_device

        with user_errors(), plain_warnings():
            place = find_device(device)
            warn_unfinished(self.path)
            return load_edited(chosen_base(text_of(model), None, self.content), self.content, place)


def edit_of(edit: Edit | Place) -> Edit:
    """The edit, read if its path is given."""
    return edit if isinstance(edit, Edit) else Edit(edit)


def path_of(edit: Edit | Place, option: str = "ckpt_path") -> Path:
    """The checkpoint or the delta of an edit, given as ``option``.

    Raises:
        UserError: There is no such file.
    """
    if isinstance(edit, Edit):
        return edit.path
    with user_errors():
        check_checkpoint(os.fspath(edit), option)
    return checkpoint_of(Path(edit).expanduser())


def text_of(place: Place | None) -> str | None:
    """A path as text."""
    return None if place is None else os.fspath(place)
