from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_unlearn.callbacks.numbers import CheckNumbers, NumericalError
from lit_unlearn.methods.value_refinement import ValueRefinement


class BreaksAt(ValueRefinement):
    """Its loss, or only the gradient of its loss, is not finite from the third step on."""

    gradient_only = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step < 2:
            return loss
        if self.gradient_only:
            # sqrt has an infinite slope at 0 and a finite value.
            return loss + (self.values.sum() * 0).sqrt()
        return loss * torch.inf


class GradientBreaks(BreaksAt):
    gradient_only = True


class Seen(L.Callback):
    """What V1 is before each step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.values.append(module.values.detach().clone())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(BreaksAt, "The loss is inf at step 2"), (GradientBreaks, "The gradient of values is not finite at step 2")],
)
def test_the_run_stops_and_keeps_what_it_was_before(
    kind: type[ValueRefinement], message: str, refinement: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path
) -> None:
    seen = Seen()
    with pytest.raises(NumericalError, match=message) as error:
        fit(refinement(kind, first_layer=2), seen, CheckNumbers(), steps=5)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert str(path) in str(error.value)
    saved = torch.load(path, weights_only=True)["state_dict"]["values"]
    assert torch.equal(saved, seen.values[2])
    assert not torch.equal(saved, seen.values[1])


def test_a_large_change_is_said(refinement: Callable[..., Any], fit: Callable[..., Any]) -> None:
    class Moves(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            with torch.no_grad():
                for layer in module.layers.values():
                    layer.weight.mul_(1.5)

    with pytest.warns(UserWarning, match=r"have moved by 0\.50 of their norm, more than max_weight_change=0\.4"):
        fit(refinement(first_layer=2), Moves(), CheckNumbers(max_weight_change=0.4), steps=1)
    fit(refinement(first_layer=2), Moves(), CheckNumbers(max_weight_change=0.6), steps=1)  # a warning would be an error


def test_a_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_weight_change=0 must be positive"):
        CheckNumbers(max_weight_change=0)
