"""Methods with solvers that are not their own: what is written, what stays, and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import KV, LAYERS, changed, states, weights
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.callbacks.numbers import NumericalError
from lit_unlearn.core.closed_form import ridge_map_update
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.refined_null_space import RefinedNullSpace
from lit_unlearn.core.solvers import LeastSquares, Retained, RidgeMap, Solver
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.unet_value_refinement import UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement

Fit = Callable[..., L.Trainer]
Build = Callable[..., Any]
EYE = torch.eye(32, dtype=torch.float64)
RETAIN = ["an owl", "a castle", "a lemon", "the sunset", "dancing", "rain"]


@pytest.fixture
def method(tiny_sd: Path, pets: str) -> Build:
    """Makes a method that edits the dog out of ``tiny_sd``; takes its class and the arguments that differ."""

    def build(kind: type[ClosedFormMethod], **arguments: Any) -> ClosedFormMethod:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        return kind(**{**defaults, **arguments})

    return build


def kept(module: ClosedFormMethod) -> Retained:
    """What all layers of ``module`` retain."""
    (own,) = set(module.retained.values())
    return own


def moved(module: ClosedFormMethod, keys: Tensor) -> float:
    """By how much the outputs of ``keys`` (n, D) have moved, relative to what they were; the most of all layers."""
    found = []
    for name, layer in module.layers.items():
        before, after = module.pretrained.values[name].double(), layer.weight.detach().double()
        found.append(float((keys @ (after - before).mT).norm() / (keys @ before.mT).norm()))
    return max(found)


def projected(W: Tensor, keys: Tensor, values: Tensor, P: Tensor, ridge: float) -> Tensor:
    """The null-space edit of W with columns and inverses, as it is printed: ``R K1ᵀ P (K1 K1ᵀ P + ridge I)⁻¹``."""
    K1 = keys.mT
    return (values.mT - W @ K1) @ K1.mT @ P @ torch.linalg.inv(K1 @ K1.mT @ P + ridge * EYE)


# --- combinations


def test_uce_in_the_null_space(method: Build, fit: Fit) -> None:
    def edited(solver: Solver) -> UCE:
        module = method(UCE, preserve=["a cat", "the cat in the rain"], preserve_tokens="last_subject")
        fit(module, ClosedFormEdit(solver))
        return module

    solver = NullSpace(1e-10, "max", ridge=1e-3)
    module = edited(solver)
    with module.pretrained.restored():
        preserved = states(module, "a cat", "the cat in the rain").double()[[0, 1], [2, 5]]
    P = solver.null_spaces[kept(module)].projection
    assert_close(P @ preserved.mT, torch.zeros(32, 2, dtype=torch.float64), rtol=0, atol=1e-6)
    for name, layer in module.layers.items():
        W = module.pretrained.values[name].double()
        change = projected(W, module.mapped["tokens"].keys, module.mapped["tokens"].guides[0] @ W.mT, P, 1e-3)
        # Rounded to float32 once.
        assert_close(layer.weight.detach().double(), W + change, rtol=1e-6, atol=1e-6)
        report = module.report["layers"][name]
        assert report["null_space_dimension"] == 30
        assert report["leak"] < 1e-6
    # The preserved names keep their outputs to rounding, which UCE's own solver only weighs; the dog goes all the same.
    assert moved(module, preserved) < 1e-6
    assert moved(edited(RidgeMap()), preserved) > 1e-3
    for layer in module.layers.values():
        wished = module.mapped["tokens"].guides[0] @ layer.weight.detach().double().mT
        assert wished.isfinite().all()
    assert moved(module, module.mapped["tokens"].keys) > 0.1


def test_speed_by_uces_solver(method: Build, fit: Fit) -> None:
    module = method(SPEED, retain=RETAIN)
    module.configure_model()
    before = weights(module)
    fit(module, ClosedFormEdit(RidgeMap(2.0, 0.7, 0.3)))
    retained = kept(module).keys
    assert retained is not None and len(retained) == len(RETAIN) + 1
    after = weights(module)
    assert changed(before, after) == module.edited_names
    for name in module.edited_names:
        W = before[name].double()
        expected = ridge_map_update(W, module.keys["tokens"], module.anchors["tokens"] @ W.mT, retained, 2.0, 0.7, 0.3)
        assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
        report = module.report["layers"][name]
        assert report["residual"] < 0.9 * report["residual_before"]
    heavier = method(SPEED, retain=RETAIN)
    fit(heavier, ClosedFormEdit(RidgeMap(2.0, 1e9, 0.3)))
    assert moved(heavier, retained) < 1e-5 < 1e-3 < moved(module, retained)
    assert moved(heavier, module.keys["tokens"]) > 1e-2


def test_speed_in_one_null_space(method: Build, fit: Fit) -> None:
    solver, module = NullSpace(1e-10, "max", ridge=1e-3), method(SPEED, retain=RETAIN)
    fit(module, ClosedFormEdit(solver))
    retained = kept(module).keys
    assert retained is not None
    assert len(solver.null_spaces) == 1
    assert moved(module, retained) < 1e-6
    assert moved(module, module.keys["tokens"]) > 1e-2


def test_keys_and_values_of_the_unet_by_least_squares(refinement: Build, fit: Fit) -> None:
    module = refinement(UNetValueRefinement, watched_prompts=2, values="target", positions="content")
    fit(module, ClosedFormEdit(LeastSquares(0.5, 2.0, "mean")), steps=1)
    assert set(module.report["layers"]) == set(KV)
    with module.pretrained.restored():
        pairs = module.paired.first
        keys = states(module, *module.edit_prompts).double()[pairs.mask.cpu()]
        goal = pairs.align(states(module, *module.target_prompts)).double()[pairs.mask.cpu()]
    C0 = kept(module).moment / kept(module).count
    K1 = keys.mT
    for name, layer in module.layers.items():
        W = module.pretrained.values[name].double()
        change = W @ (goal - keys).mT @ K1.mT @ torch.linalg.inv(2.0 * C0 + K1 @ K1.mT + 0.5 * EYE)
        # Values in float32, weights rounded to float32.
        assert_close(layer.weight.detach().double(), W + change, rtol=1e-5, atol=1e-5)
        assert change.norm() > 1e-3 * W.norm()


def test_refined_values_by_uces_solver(refinement: Build, fit: Fit) -> None:
    module: ValueRefinement = refinement(values="target")
    fit(module, ClosedFormEdit(RidgeMap(preserve_scale=None, lamb=1e-3)), steps=1)
    assert {own.prompts for own in module.retained.values()} == {len(module.retain_prompts)} == {2}
    for name in LAYERS:
        report = module.report["layers"][name]
        assert report["residual"] < report["residual_before"]
    assert module.report["retained_state_drift"] > 0


def test_a_solver_that_does_not_fit_is_refused_before_the_first_step(refinement: Build, fit: Fit) -> None:
    module = refinement()
    with pytest.raises(NumericalError, match=rf"{LAYERS[0]}: RefinedNullSpace needs each retained key"):
        fit(module, ClosedFormEdit(RefinedNullSpace()))
    assert module.progress == {"prepared": -1, "applied": 0}


@pytest.mark.parametrize("solver", [NullSpace(), LeastSquares()], ids=lambda solver: type(solver).__name__)
def test_a_solver_that_retains_needs_something_to_retain(solver: Solver, method: Build, fit: Fit) -> None:
    module = method(UCE, preserve=None, preserve_tokens="last_subject")
    with pytest.raises(NumericalError, match=f"{type(solver).__name__} needs the second moment .* model.preserve"):
        fit(module, ClosedFormEdit(solver))
    assert module.pretrained.change_ratio() == 0


def test_speeds_solver_needs_speed(method: Build, fit: Fit) -> None:
    module = method(UCE)
    with pytest.raises(NumericalError, match="which only SPEED provides: choose edit: NullSpace or RidgeMap"):
        fit(module, ClosedFormEdit(RefinedNullSpace()))
    assert module.pretrained.change_ratio() == 0


# --- from Python


def test_a_trainer_takes_the_solver_as_a_callback(refinement: Build, fit: Fit, tmp_path: Path) -> None:
    module = refinement(values="target")
    solver = NullSpace(threshold=16, rule="count", ridge=1e-3)
    trainer = fit(module, ClosedFormEdit(solver), steps=1)
    assert module.report["weight_change_ratio"] > 0
    trainer.save_checkpoint(tmp_path / "edit.ckpt")
    edit = read_edit(tmp_path / "edit.ckpt")
    assert edit.edit == solver.settings()
    assert edit.edit["init_args"]["threshold"] == 16
    assert list(edit.weights) == LAYERS


# --- precision


def own_formula(module: Any, solver: Solver, W: Tensor) -> Tensor:
    """The new weight (d_out, d_in), float64, of ``module`` by ``solver``, with columns and inverses."""
    goal, retained = module.layer_targets(W, "tokens"), kept(module)
    assert retained.moment is not None
    if isinstance(solver, NullSpace):
        return W + projected(
            W, module.mapped["tokens"].keys, goal, solver.null_spaces[retained].projection, solver.ridge
        )
    assert isinstance(solver, RidgeMap) and solver.preserve_scale is not None
    left = (
        solver.lamb * W
        + solver.erase_scale * goal.mT @ module.mapped["tokens"].keys
        + solver.preserve_scale * W @ retained.moment
    )
    right = (
        solver.erase_scale * module.mapped["tokens"].keys.mT @ module.mapped["tokens"].keys
        + solver.preserve_scale * retained.moment
    )
    return left @ torch.linalg.inv(right + solver.lamb * EYE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "solver", [RidgeMap(2.0, 0.7, 0.3), NullSpace(16, "count", ridge=0.1)], ids=lambda solver: type(solver).__name__
)
def test_half_precision_is_solved_in_float64_and_rounded_once(
    dtype: str, solver: Solver, method: Build, fit: Fit
) -> None:
    module = method(UCE, dtype=dtype, prompts="edit_prompts", tokens="all")
    fit(module, ClosedFormEdit(solver))
    kind = getattr(torch, dtype)
    for name, layer in module.layers.items():
        before, after = module.pretrained.values[name], layer.weight.detach()
        assert before.dtype == after.dtype == kind
        assert torch.equal(after, own_formula(module, solver, before.double()).to(kind)), name
        assert (after.double() - before.double()).norm() > 1e-2 * before.double().norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_a_text_layer_is_rounded_once(dtype: str, refinement: Build, fit: Fit) -> None:
    solved: list[tuple[str, Tensor]] = []

    class Remember(LeastSquares):
        def solve(self, writes: Any) -> Any:
            found = super().solve(writes)
            for write, one in zip(writes, found, strict=True):
                K1, V1, C0 = write.keys.double().mT, write.values.double().mT, write.retained.moment
                change = (V1 - write.weight @ K1) @ K1.mT
                eye = torch.eye(len(C0), dtype=torch.float64)
                change = change @ torch.linalg.inv(C0 + K1 @ K1.mT + 0.5 * eye)
                assert_close(one.change, change, rtol=0, atol=1e-9)
                solved.append((write.name, (write.weight + one.change).to(write.dtype)))
            return found

    module = refinement(values="target", dtype=dtype)
    fit(module, ClosedFormEdit(Remember(ridge=0.5)), steps=1)
    assert [name for name, _ in solved] == LAYERS
    for name, expected in solved:
        weight = module.layers[name].weight.detach()
        assert weight.dtype == expected.dtype == getattr(torch, dtype)
        assert torch.equal(weight, expected)
