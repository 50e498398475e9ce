"""Base of the closed-form methods, which say what to write, when, and which outputs should not change.

Data flow: at the start of a fit the method gathers the keys whose outputs should not change (``retained``). At the end
of each epoch the callback ``ClosedFormEdit`` calls ``writes(epoch)``, passes each group to its solver, and writes the
result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY


class ClosedFormMethod(DiffusionEditor):
    """Base of the methods whose weights a closed form writes; the recipe's ``edit`` says which one.

    A method must list it before ``ConceptEditor`` among its bases. By default everything is known before the first
    step, and the fit is one epoch of a single step that does not train anything.
    """

    layers: dict[str, nn.Linear]
    """The edited linear maps, by the full names of their weights."""
    retained: Mapping[str, Retained]
    """For each of them, the keys whose outputs should not change; set at the start of the fit, or before a write for
    layers whose moments are not held from the start."""

    edit: dict[str, Any] | None = None
    """The solver and its settings, in the form of the recipe."""
    remedy: str = "raise its ridge"
    """The solver's advice for a system that is ill-conditioned."""

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch of one step."""
        return FitPlan(epochs=1, steps=1)

    def configure_model(self) -> None:
        """Load the pipeline, find the layers, and allocate V1, which an epoch may train."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        self.layers = self.pipeline.sites(self.edited_names)
        self.values = nn.Parameter(torch.zeros(self.values_shape()))

    def values_shape(self) -> tuple[int, ...]:
        """Shape of V1; a method that does not train V1 has a single number.

        That number is needed since Lightning saves checkpoints only after optimizer steps, and DDP refuses a module
        without a trainable parameter.
        """
        return ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that changes nothing."""
        return torch.optim.SGD([self.values], lr=0.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss without effect."""
        return self.values * 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store the solver and its settings."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["edit"] = self.edit

    @abstractmethod
    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """Writes at the end of ``epoch``, in groups that are solved together, each computed after the write before."""

    def written_epochs(self) -> int:
        """Number of epochs written, also before a run was resumed: an edit is written together with its step."""
        return self.current_epoch

    def before_writes(self) -> None:
        """Remember the outputs that the edits are compared to."""

    def report_of(self, write: Write, report: Mapping[str, float], epoch: int) -> dict[str, Any]:
        """Extend the solver's ``report`` about ``write`` with the method's own entries."""
        return dict(report)

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Record that the writes of ``epoch`` are done."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
