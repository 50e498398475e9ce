"""What a method says whose weights a closed form writes: what to write, when, and what is to stay.

Data flow: at the start of a fit the method gathers what is to stay (``retained``). At the end of each epoch the
callback ``ClosedFormEdit`` asks it for ``writes(epoch)``, hands each group to its solver, and writes what comes back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.methods.shared.editor import CHECKPOINT_KEY, DiffusionEditor

Batch = TypeVar("Batch")


class ClosedFormMethod(DiffusionEditor):
    """Base of the methods whose weights a closed form writes; the recipe's ``edit`` says which one.

    To stand before ``ConceptEditor`` among the bases of a method. As it is here, all is known before the first step,
    and the fit is one epoch of one step that descends nothing.
    """

    layers: dict[str, nn.Linear]
    """The linear maps that are written, by the full names of their weights."""
    retained: Mapping[str, Retained]
    """What is to stay of each of them, once the fit has started."""

    edit: dict[str, Any] | None = None
    """The solver and its settings, as the recipe has them."""
    remedy: str = "raise its ridge"
    """What to do about a system that is ill-conditioned, with this solver."""

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch of one step."""
        return FitPlan(epochs=1, steps=1)

    def configure_model(self) -> None:
        """Load the pipeline, find the layers, and make room for V1, which descends during an epoch."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        self.layers = self.pipeline.sites(self.edited_names)
        self.values = nn.Parameter(torch.zeros(self.values_shape()))

    def values_shape(self) -> tuple[int, ...]:
        """Shape of V1. A method without a descent has a single number.

        Lightning saves checkpoints after optimizer steps only, and DDP takes no module without a gradient.
        """
        return ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that changes nothing."""
        return torch.optim.SGD([self.values], lr=0.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """There is nothing to descend."""
        return self.values * 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also say how the weights were solved for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["edit"] = self.edit

    def summed_moments(
        self, batches: Sequence[Batch], inputs: Callable[[Batch], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Second moments (d_in, d_in), float64, of the layers' ``inputs`` (B, L, d_in) at all batches.

        Processes take whole batches, the same as one has, so that only the order of the sums differs.
        """
        # On the processor: those of all layers are larger than the text encoder itself.
        sums = {name: torch.zeros(*2 * [layer.in_features], dtype=torch.float64) for name, layer in self.layers.items()}
        for batch in self.processes.own_share(batches):
            for name, keys in inputs(batch).items():
                sums[name] += second_moment(keys.flatten(0, 1)).cpu()
        return {name: self.processes.total(moment) for name, moment in sums.items()}

    @abstractmethod
    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """What the end of ``epoch`` writes, in groups that are solved together; a next one comes after the write."""

    def written_epochs(self) -> int:
        """How many epochs have been written, with what a resumed run did before: an edit is written with its step."""
        return self.current_epoch

    def before_writes(self) -> None:
        """Remember what the edits are measured against."""

    def report_of(self, write: Write, report: Mapping[str, float], epoch: int) -> dict[str, Any]:
        """What to keep of a write, beside what the solver says of it."""
        return dict(report)

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Note that the writes of ``epoch`` are done."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
