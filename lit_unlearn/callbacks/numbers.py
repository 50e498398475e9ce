"""Stops a fit whose numbers go wrong, with the weights as they were before, and warns of edits that are too large."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.evaluation import run_folder
from lit_unlearn.methods.base import DiffusionEditor

CAUSES = "the learning rate is too high, or the type of the weights (model.dtype, trainer.precision) too narrow"


class NumericalError(ArithmeticError):
    """A number that is not finite: where, and what it likely comes from."""


class CheckNumbers(L.Callback):
    """Stops at a loss or gradient that is not finite, before the optimizer steps, and saves the weights as they are.

    Args:
        max_weight_change: Warn at the end of an epoch if the weights have moved by more than this fraction of their
            norm; null never warns.

    Raises:
        ValueError: ``max_weight_change`` is not positive.
        NumericalError: A loss or gradient is not finite.
    """

    def __init__(self, max_weight_change: float | None = None) -> None:
        if max_weight_change is not None and max_weight_change <= 0:
            raise ValueError(f"max_weight_change={max_weight_change} must be positive, or null for no warning.")
        self.max_weight_change = max_weight_change

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self._stop(trainer, f"The loss is {float(loss.detach())}")

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # A sum is finite only if all are, and one number to look at.
                if parameter.grad is not None and not torch.isfinite(parameter.grad.sum()):
                    self._stop(trainer, f"The gradient of {names.get(id(parameter), 'a parameter')} is not finite")

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.max_weight_change is None or not isinstance(pl_module, DiffusionEditor):
            return
        ratio = pl_module.pretrained.change_ratio()
        if ratio > self.max_weight_change:
            rank_zero_warn(
                f"The edited weights have moved by {ratio:.2f} of their norm, more than max_weight_change="
                f"{self.max_weight_change}: look at other concepts' pictures; a larger ridge, fewer steps or a lower "
                "learning rate make a smaller edit."
            )

    def _stop(self, trainer: L.Trainer, what: str) -> Any:
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        raise NumericalError(
            f"{what} at step {trainer.global_step} (epoch {trainer.current_epoch}): presumably {CAUSES}; the weights "
            f"as they were before this step are in {path}."
        )
