"""The callbacks of a command: the recipe's own, and the ones that write the command's results."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.callbacks.embeddings import SaveEmbeddings
from lit_unlearn.callbacks.evaluation import EvaluationReport
from lit_unlearn.callbacks.export import SavePretrained
from lit_unlearn.callbacks.memorisation import MemorisationReport
from lit_unlearn.callbacks.numbers import CheckNumbers
from lit_unlearn.callbacks.pictures import SavePictures
from lit_unlearn.callbacks.preemption import SaveOnSignal
from lit_unlearn.core.solvers import Solver
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.image_editor import ImageEditor
from lit_unlearn.methods.textual_inversion import TextualInversion
from lit_unlearn.system.errors import warn

ALWAYS: dict[str, list[type[L.Callback]]] = {"fit": [SaveOnSignal, CheckNumbers], "test": [SaveOnSignal]}
"""Callbacks that a command always has; the recipe may list them with its own settings."""


class LastCheckpoint(ModelCheckpoint):
    """A run's checkpoint besides those of its recipe; Lightning treats two of the same class and settings as one."""


def callbacks_of(
    subcommand: str, module: L.LightningModule, given: list[L.Callback] | L.Callback | None, solver: Solver | None
) -> list[L.Callback]:
    """The callbacks of ``subcommand``, in order; warns of callbacks that the recipe should list and does not.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        module: The module.
        given: The recipe's callbacks.
        solver: The recipe's ``edit``.
    """
    found = [given] if isinstance(given, L.Callback) else list(given or [])
    if subcommand == "fit" and solver is not None:
        found.insert(0, ClosedFormEdit(solver))  # first, because other callbacks look at the edited model
    for kind in lost(subcommand, module, found):
        warn(f"trainer.callbacks has no {kind.__name__}, which writes what {subcommand} is for: it is kept.")
        found.append(kind())
    own = [callback for callback in found if isinstance(callback, ModelCheckpoint)]
    if not any(one.dirpath is None and (one.filename == "last" or one.save_last) for one in own):
        # At the end of an epoch, after the edit; validation comes before it.
        last = (LastCheckpoint if own else ModelCheckpoint)(
            filename="last", enable_version_counter=False, save_on_train_epoch_end=True
        )
        found = [*(callback for callback in found if callback not in own), last, *own]
    found += [kind() for kind in ALWAYS.get(subcommand, []) if not _has(found, kind)]
    return found


def lost(subcommand: str, module: L.LightningModule, given: list[L.Callback]) -> list[type[L.Callback]]:
    """Classes of callbacks that write the results of ``subcommand`` and are missing in ``given``."""
    needed: dict[str, list[tuple[Any, type[L.Callback]]]] = {
        "fit": [(TextualInversion, SaveEmbeddings)],
        "test": [(ConceptEditor, EvaluationReport), (ImageEditor, MemorisationReport)],
        "predict": [(DiffusionEditor, SavePictures)],
    }
    kinds = [kind for of, kind in needed.get(subcommand, []) if isinstance(module, of)]
    if subcommand == "fit" and hasattr(module, "save_pretrained"):  # it trains a part of a model
        kinds.append(SavePretrained)
    return [kind for kind in kinds if not _has(given, kind)]


def _has(callbacks: list[L.Callback], kind: type[L.Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
