"""Stops a fit when numbers are not finite, and warns of edits that are too large or dominated by rounding errors."""

from __future__ import annotations

import math
from typing import NoReturn

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.editor import DiffusionEditor

CAUSES = "the learning rate is too high, or the type of the weights (model.dtype, trainer.precision) too narrow"


class NumericalError(ArithmeticError):
    """A number is not finite, or a system cannot be solved; the message says where, and the likely cause."""


def write_finite(name: str, weight: Tensor, edited: Tensor) -> None:
    """Write ``edited`` into the weight called ``name``, rounded to its type.

    Raises:
        NumericalError: It is not finite in that type; the weight is unchanged.
    """
    rounded = edited.to(weight)
    if not bool(rounded.isfinite().all()):
        raise NumericalError(
            f"{name}: the edited weight, with values up to {float(edited.abs().max()):.3g}, is not finite in "
            f"{weight.dtype}: "
            "raise the ridge, or load the model in another type (model.dtype)."
        )
    weight.copy_(rounded)


class CheckNumbers(L.Callback):
    """Stops at a loss or gradient that is not finite, before the optimizer steps, and saves the weights as they are.

    Args:
        max_weight_change: Warn at the end if an edited weight has changed by more than this many times its Frobenius
            norm; null never warns.
        max_condition_number: Warn if a closed form has solved a system with a larger condition number; null never
            warns. Above 1e9 the rounding errors of float64 exceed the resolution of float32 weights.

    Raises:
        ValueError: A limit is not positive.
        NumericalError: A loss or gradient is not finite.
    """

    def __init__(self, max_weight_change: float | None = 10.0, max_condition_number: float | None = 1e9) -> None:
        limits = {"max_weight_change": max_weight_change, "max_condition_number": max_condition_number}
        for field, value in limits.items():
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value} must be positive, or null for no warning.")
        self.max_weight_change, self.max_condition_number = max_weight_change, max_condition_number
        self._said: set[tuple[str, float]] = set()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # Also the means over the global batch, so that all processes stop together and none waits for another.
        for value in (*getattr(pl_module, "step_losses", {}).values(), loss.detach()):
            if not torch.isfinite(value):
                self._stop(trainer, f"The loss is {float(value)}")

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # the loss is scaled until it overflows, and the scaler skips such steps
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # A sum is finite only if all its terms are, so one number is checked.
                if parameter.grad is not None and not torch.isfinite(parameter.grad.sum()):
                    self._stop(trainer, f"The gradient of {names.get(id(parameter), 'a parameter')} is not finite")

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if broken := self._broken(trainer):  # before the epoch's checkpoint
            self._stop(trainer, f"{broken} is not finite")
        self._check_conditions(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_conditions(trainer, pl_module)  # again, if the recipe lists this callback before the edit
        if self.max_weight_change is None or not isinstance(pl_module, DiffusionEditor) or not trainer.is_global_zero:
            return
        # Weights that were zero, such as a new bias, have no norm to compare to.
        changes = {name: ratio for name, ratio in pl_module.pretrained.change_ratios().items() if math.isfinite(ratio)}
        most = max(changes, key=lambda name: changes[name], default=None)
        if most is not None and changes[most] > self.max_weight_change:
            ratio = pl_module.pretrained.change_ratio()
            rank_zero_warn(
                f"{most} has changed by {changes[most]:.2f} times its norm (all edited weights by {ratio:.2f}), more "
                f"than max_weight_change={self.max_weight_change:g}: look at other concepts' pictures; a larger ridge, "
                "fewer steps or a lower learning rate make a smaller edit."
            )

    def _check_conditions(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Warn of the system with the largest condition number since the last check."""
        if self.max_condition_number is None or not isinstance(module, DiffusionEditor):
            return
        found = {
            (name, float(layer["condition_number"]))
            for name, layer in module.report.get("layers", {}).items()
            if layer.get("condition_number", 0.0) > self.max_condition_number
        } - self._said
        if not found:
            return
        self._said |= found
        name, number = max(found, key=lambda pair: (pair[1], pair[0]))
        others = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        remedy = module.remedy if isinstance(module, ClosedFormMethod) else "raise its ridge"
        rank_zero_warn(
            f"{name}{others}: the system that was solved has the condition number {number:.1e}, more than "
            f"max_condition_number={self.max_condition_number:g}, so rounding errors dominate the edit: {remedy}."
        )

    @staticmethod
    def _broken(trainer: L.Trainer) -> str | None:
        """Name of a weight that is not finite on any process; then all processes must stop without saving."""
        module = trainer.lightning_module
        name = not_finite(module)
        if trainer.world_size > 1:
            found = trainer.strategy.reduce(torch.tensor(int(name is not None), device=module.device), reduce_op="sum")
            name = name or ("a weight of another process" if found else None)
        return name

    def _stop(self, trainer: L.Trainer, what: str) -> NoReturn:
        path = folder_of(trainer) / "checkpoints" / "last.ckpt"
        module = trainer.lightning_module
        layer = module.current_layer if isinstance(module, DiffusionEditor) else None
        where = f", {layer}" if layer else ""
        place = f"{what} at step {trainer.global_step} (epoch {trainer.current_epoch}{where}): presumably {CAUSES}"
        if broken := self._broken(trainer):  # an earlier step may have overflowed in half precision
            kept = f"{path} is of an earlier step" if path.exists() else "nothing was saved"
            raise NumericalError(f"{place}; {broken} is not finite any more, so {kept}.")
        trainer.save_checkpoint(path)
        raise NumericalError(f"{place}; the weights as they were before this step are in {path}.")


def not_finite(module: L.LightningModule) -> str | None:
    """Name of a weight in the checkpoint's state with values that are not finite; None if all are finite."""
    kept = {*module.written_names, *module.own_state()} if isinstance(module, DiffusionEditor) else None
    for name, value in module.state_dict().items():
        # A sum is finite only if all are, and one number to look at.
        if (kept is None or name in kept) and value.is_floating_point() and not torch.isfinite(value.float().sum()):
            return name
    return None
