from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from helpers import LAYERS, by_least_squares, by_null_space, by_refined_null_space, by_ridge_map, hook
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.callbacks.numbers import CheckNumbers, NumericalError, write_finite
from lit_unlearn.core.solvers import LeastSquares, Solved, Write
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE
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


def test_weights_that_are_broken_already_do_not_replace_those_that_are_not(
    refinement: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path
) -> None:
    # As Adam does in half precision: the step itself writes what is not a number, and the next loss tells of it.
    def breaks(trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            module.values.data.fill_(torch.nan)

    path = tmp_path / "checkpoints" / "last.ckpt"
    expected = r"The loss is nan at step 2 \(epoch 0, text_encoder\S+\): .*; values is not finite any more, so "
    with pytest.raises(NumericalError, match=expected + "nothing was saved"):
        fit(refinement(first_layer=2), hook("on_train_batch_end", breaks), CheckNumbers(), steps=5)
    assert not path.exists()
    path.parent.mkdir()
    path.write_bytes(b"earlier")
    with pytest.raises(NumericalError, match=expected + f"{path} is of an earlier step"):
        fit(refinement(first_layer=2), hook("on_train_batch_end", breaks), CheckNumbers(), steps=5)
    assert path.read_bytes() == b"earlier"


def test_weights_that_break_in_the_last_step_stop_the_run_before_its_checkpoint(
    refinement: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    def breaks(trainer: L.Trainer, module: Any, *_: Any) -> None:
        next(iter(module.layers.values())).weight.data.fill_(torch.inf)

    with pytest.raises(NumericalError, match=r"text_encoder\S+ is not finite at step 2 .* nothing was saved"):
        fit(refinement(first_layer=2), hook("on_train_batch_end", breaks), CheckNumbers(), steps=2)


def test_gradients_that_are_scaled_are_left_to_the_scaler(refinement: Callable[..., Any]) -> None:
    module = refinement()
    module.configure_model()
    module.values.grad = torch.full_like(module.values, torch.inf)
    optimizer = torch.optim.SGD([module.values])
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    CheckNumbers().on_before_optimizer_step(scaled, module, optimizer)  # type: ignore[arg-type]
    plain = SimpleNamespace(precision_plugin=SimpleNamespace())
    with pytest.raises(AttributeError, match="log_dir"):  # it goes on to save
        CheckNumbers().on_before_optimizer_step(plain, module, optimizer)  # type: ignore[arg-type]


def test_a_large_change_of_one_weight_is_said(refinement: Callable[..., Any], fit: Callable[..., Any]) -> None:
    def moves(trainer: L.Trainer, module: Any, *_: Any) -> None:
        with torch.no_grad():
            list(module.layers.values())[-1].weight.mul_(3)

    # Tripled twice, once for each layer's epoch: by 8 of its norm, while the two layers together moved by less than 7.
    with pytest.warns(UserWarning, match=r"has changed by 8\.00 times its norm \(all edited weights by 5\."):
        fit(refinement(), hook("on_train_epoch_start", moves), CheckNumbers(max_weight_change=7), steps=1)


def test_a_large_change_is_said(refinement: Callable[..., Any], fit: Callable[..., Any]) -> None:
    class Moves(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            with torch.no_grad():
                for layer in module.layers.values():
                    layer.weight.mul_(1.5)

    expected = (
        r"text_encoder\S+ has changed by 0\.50 times its norm \(all edited weights by 0\.50\), more than "
        r"max_weight_change=0\.4: look"
    )
    with pytest.warns(UserWarning, match=expected):
        fit(refinement(first_layer=2), Moves(), CheckNumbers(max_weight_change=0.4), steps=1)
    fit(refinement(first_layer=2), Moves(), CheckNumbers(max_weight_change=0.6), steps=1)  # a warning would be an error


def test_a_limit_must_be_positive() -> None:
    for field in ("max_weight_change", "max_condition_number"):
        for value in (0, -1, float("nan")):
            with pytest.raises(ValueError, match=f"{field}={value} must be positive, or null for no warning"):
                CheckNumbers(**{field: value})
    assert CheckNumbers(None, None).max_weight_change is None


def test_an_edit_as_large_as_honest_ones_is_not_warned_of_and_a_larger_one_is(
    refinement: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    class Moves(L.Callback):
        def __init__(self, times: float) -> None:
            self.times = times

        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            with torch.no_grad():
                for name, layer in module.layers.items():
                    layer.weight.copy_(module.pretrained.values[name] * (1 + self.times))

    # The largest of one concept in docs/results/emoji20.md is 8.1; the default limit is 10.
    fit(refinement(first_layer=2), Moves(8.1), CheckNumbers(), steps=1)  # a warning would be an error
    fit(refinement(first_layer=2), Moves(12.0), CheckNumbers(max_weight_change=None), steps=1)
    with pytest.warns(UserWarning, match=r"has changed by 12\.00 times its norm .* more than max_weight_change=10:"):
        fit(refinement(first_layer=2), Moves(12.0), CheckNumbers(), steps=1)


# --- systems of closed forms


def conditions(module: Any) -> dict[str, float]:
    return {name: layer["condition_number"] for name, layer in module.report["layers"].items()}


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: by_null_space(threshold=1e-8, rule="max", ridge=1e-11), "raise edit.ridge"),
        (lambda: by_least_squares(ridge=1e-9), "raise edit.ridge"),
    ],
)
def test_the_worst_layer_of_the_text_encoder_is_named(
    make: Callable[[], L.Callback], remedy: str, refinement: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    module = refinement(values="target", positions="content")
    with pytest.warns(UserWarning, match="condition number") as caught:
        fit(module, make(), CheckNumbers(None), steps=1)
    found = conditions(module)
    assert list(found) == LAYERS
    assert all(number > 1e9 for number in found.values())
    said = [str(warning.message) for warning in caught if "condition number" in str(warning.message)]
    for line, (name, number) in zip(said, found.items(), strict=True):  # each when its epoch ends
        assert line == (
            f"{name}: the system that was solved has the condition number {number:.1e}, more than max_condition_number="
            f"1e+09, so rounding errors dominate the edit: {remedy}."
        )


def test_a_large_enough_ridge_is_not_warned_of(refinement: Callable[..., Any], fit: Callable[..., Any]) -> None:
    module = refinement(values="target")
    fit(module, by_least_squares(ridge=1.0), CheckNumbers(None), steps=1)  # a warning would be an error
    assert all(1 < number < 1e9 for number in conditions(module).values())
    # Also if the callbacks stand the other way round, which sees the last layer only at the end.
    module = refinement(values="target")
    with pytest.warns(UserWarning, match="condition number") as caught:
        fit(module, CheckNumbers(None, 2.0), by_least_squares(ridge=1.0), steps=1)
    names = [str(w.message).split(":")[0] for w in caught if "condition number" in str(w.message)]
    assert names == LAYERS
    fit(refinement(values="target"), by_least_squares(ridge=1e-9), CheckNumbers(None, None), steps=1)


def test_uce_and_speed_name_the_worst_and_how_many_more(tiny_sd: Path, pets: str, fit: Callable[..., Any]) -> None:
    for module, edit, remedy in (
        (UCE(concept="dog", concept_set=pets, model=str(tiny_sd)), by_ridge_map(lamb=1e-9), "raise edit.lamb"),
        (
            SPEED(concept="dog", concept_set=pets, model=str(tiny_sd)),
            by_refined_null_space(retain_scale=1e-10, threshold=1e-6),
            "raise edit.retain_scale",
        ),
    ):
        with pytest.warns(UserWarning, match="condition number") as caught:
            fit(module, edit, CheckNumbers(None))
        found = conditions(module)
        worst = max(found.values())
        (line,) = [str(w.message) for w in caught if "condition number" in str(w.message)]
        assert line.split(" (and ")[0] in [name for name, number in found.items() if number == worst]
        assert f"(and {len(found) - 1} more like it): the system" in line
        assert f"condition number {worst:.1e}, more than" in line
        assert line.endswith(f": {remedy}.")


def test_what_cannot_be_solved_is_said_with_its_layer(
    refinement: Callable[..., Any], fit: Callable[..., Any], tiny_sd: Path, pets: str
) -> None:
    module = refinement(values="target")
    with pytest.raises(NumericalError, match=rf"{LAYERS[0]}: The 128 x 128 system is singular with ridge=0: .* larger"):
        fit(module, by_least_squares(ridge=0.0), steps=1)
    before = module.pretrained.values[LAYERS[0]]
    assert torch.equal(module.pipeline.named_parameters()[LAYERS[0]], before)
    expected = "The cross-attention: The 32 x 32 system is singular with ridge=1e-18: .* The ridge is edit.lamb"
    with pytest.raises(NumericalError, match=expected):
        fit(UCE(concept="dog", concept_set=pets, model=str(tiny_sd), preserve=None), by_ridge_map(lamb=1e-18))
    with pytest.raises(NumericalError, match=r"to_v.weight: The \d+ x \d+ system is singular with retain_scale=1e-300"):
        fit(
            SPEED(concept="dog", concept_set=pets, model=str(tiny_sd)),
            by_refined_null_space(retain_scale=1e-300, threshold=1e-6),
        )


def test_keys_that_are_not_finite_are_said_with_their_layer(
    refinement: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    class Broken(LeastSquares):
        def solve(self, writes: Sequence[Write]) -> list[Solved]:
            return super().solve([replace(write, keys=write.keys * torch.nan) for write in writes])

    with pytest.raises(NumericalError, match=rf"{LAYERS[0]}: keys holds \d+ values that are not finite"):
        fit(refinement(values="target"), ClosedFormEdit(Broken(ridge=1.0)), steps=1)


def test_an_edit_that_the_type_of_the_weight_cannot_hold_is_not_written() -> None:
    weight = torch.ones(2, 3, dtype=torch.float16)
    edited = torch.full((2, 3), 7e4, dtype=torch.float64)  # float16 ends at 65504
    with pytest.raises(
        NumericalError, match=r"layer: the edited weight, with values up to 7e\+04, is not finite in torch.float16"
    ):
        write_finite("layer", weight, edited)
    assert torch.equal(weight, torch.ones(2, 3, dtype=torch.float16))
    write_finite("layer", weight, edited / 2)
    assert torch.equal(weight, torch.full((2, 3), 3.5e4, dtype=torch.float16))
