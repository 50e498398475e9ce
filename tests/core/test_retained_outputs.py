"""Sizes of outputs at the retained keys, against the direct products in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import normal
from lit_unlearn.core import retained_outputs
from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.retained_outputs import RetainedOutputs, energy, leak
from lit_unlearn.core.solvers import Retained, Write

D_IN, D_OUT, NAME = 40, 12, "layer.weight"


KEPT = normal(90, D_IN, seed=3) * torch.logspace(0, -4, D_IN, dtype=torch.float64)
"""Retained keys that use all directions, but the last ones hardly."""
MOMENT = second_moment(KEPT)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the products with the whole moment, one for each."""
    found: list[torch.dtype] = []

    def counted(matrix: Tensor, moment: Tensor, dtype: torch.dtype = torch.float64) -> float:
        found.append(dtype)
        return energy(matrix, moment, dtype)

    monkeypatch.setattr(retained_outputs, "energy", counted)
    return found


def write(weight: Tensor, retained: Retained, dtype: torch.dtype, num_keys: int, seed: int = 0) -> Write:
    keys, values = normal(num_keys, D_IN, seed=seed + 10), normal(num_keys, D_OUT, seed=seed + 20)
    return Write(NAME, weight, dtype, keys, values, retained)


def prepared(solver: NullSpace, weight: Tensor | None) -> Retained:
    def share(calls: Sequence[Callable[[], Any]]) -> list[Any]:
        return [call() for call in calls]

    retained, weights = Retained(MOMENT, len(KEPT)), None if weight is None else {NAME: weight}
    solver.prepare({NAME: retained}, share, torch.device("cpu"), weights)
    return retained


def direct(change: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    rounded = (weight + change).to(dtype).double() - weight
    return float((KEPT @ rounded.mT).norm() / (KEPT @ weight.mT).norm())


@pytest.mark.parametrize("block", [7, 8, 39, 40, 384])
def test_an_energy_is_that_of_the_outputs_in_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retained_outputs, "BLOCK", block)
    weight = normal(D_OUT, D_IN, seed=0)
    expected = float((KEPT @ weight.mT).square().sum())
    assert energy(weight, MOMENT) == pytest.approx(expected, rel=1e-13)
    assert energy(weight, MOMENT, torch.float32) == pytest.approx(expected, rel=1e-6)
    assert leak(weight / 8, weight, MOMENT) == pytest.approx(1 / 8, rel=1e-13)
    assert energy(weight, 0 * MOMENT) == 0 and leak(weight, weight, 0 * MOMENT) != leak(weight, weight, 0 * MOMENT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_keys", [3, 15, 30, 200])  # over the keys in both orders, over the basis, from sums
@pytest.mark.parametrize("rule", ["mean", "soft"])
def test_the_leak_is_that_of_the_stored_change(rule: Any, num_keys: int, dtype: torch.dtype) -> None:
    weight = normal(D_OUT, D_IN, seed=0).to(dtype).double()
    solver = NullSpace(1e-2, rule, ridge=0.1)
    retained = prepared(solver, weight)
    for seed in range(3):  # each round carries ||W K0|| over its edit
        (solved,) = solver.solve([write(weight, retained, dtype, num_keys, seed)])
        assert solved.report["leak"] == pytest.approx(direct(solved.change, weight, dtype), rel=5e-7)
        weight = (weight + solved.change).to(dtype).double()


@pytest.mark.parametrize("arguments", [{"forget_unused": True}, {"tolerance": 1e-3}, {"threshold": 1e-7}])
def test_the_leak_is_right_with_every_setting(arguments: dict[str, Any]) -> None:
    weight = normal(D_OUT, D_IN, seed=0).float().double()
    solver = NullSpace(**{"ridge": 0.1, **arguments})
    (solved,) = solver.solve([write(weight, prepared(solver, weight), torch.float32, 3)])
    assert solved.report["leak"] == pytest.approx(direct(solved.change, weight, torch.float32), rel=5e-7)


def test_a_report_of_a_prepared_layer_takes_no_product_with_the_moment(products: list[torch.dtype]) -> None:
    weight = normal(D_OUT, D_IN, seed=0).float().double()
    solver = NullSpace(1e-2)
    retained = prepared(solver, weight)
    assert products == [torch.float32]  # ||W K0||, once
    for seed in range(3):
        (solved,) = solver.solve([write(weight, retained, torch.float32, 3, seed)])
        weight = (weight + solved.change).float().double()
    assert products == [torch.float32]
    solver.solve([write(normal(D_OUT, D_IN, seed=1), retained, torch.float32, 3)])  # a weight that it does not know
    assert products == 2 * [torch.float32]


def test_coarse_rounding_is_multiplied_and_not_carried_over(products: list[torch.dtype]) -> None:
    weight = normal(D_OUT, D_IN, seed=0).bfloat16().double()
    solver = NullSpace(1e-2)
    retained = prepared(solver, None)
    for seed in range(2):
        (solved,) = solver.solve([write(weight, retained, torch.bfloat16, 3, seed)])
        weight = (weight + solved.change).bfloat16().double()
    assert products == 4 * [torch.float32]  # ||W K0|| and the rounding, in each round


def test_a_weight_is_recognised_by_its_norm(products: list[torch.dtype]) -> None:
    outputs, weight = RetainedOutputs(), normal(D_OUT, D_IN, seed=0)
    sizes = [outputs.energy("a", one, MOMENT) for one in (weight, weight.clone(), 2 * weight)]
    assert sizes[0] == sizes[1] and sizes[2] == pytest.approx(4 * sizes[0], rel=1e-6)
    outputs.energy("b", weight, MOMENT)
    assert len(products) == 3
