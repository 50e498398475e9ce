"""What the methods share that write weights without descending: a fit of one step of nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.methods.shared.base import ConceptEditor


class OneStepEditor(ConceptEditor):
    """Base of the methods that know all before the first step: the fit is one epoch of one step."""

    def configure_model(self) -> None:
        """Load the pipeline, and make a parameter that is nothing."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        # Checkpoints are written only after an optimizer step, and DDP takes no module without a gradient.
        self.nothing = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer of nothing."""
        return torch.optim.SGD([self.nothing], lr=0.0)

    def on_fit_start(self) -> None:
        """Set the length of the run."""
        super().on_fit_start()
        self.trainer.fit_loop.max_epochs = 1
        if isinstance(data := self.trainer.datamodule, ConceptPrompts):  # type: ignore[attr-defined]
            data.steps = 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """There is nothing to descend."""
        return self.nothing * 0
