"""Closed forms of many keys, solved from sums: the same numbers, and never all keys in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import normal
from lit_unlearn.core.closed_form import (
    edit_report,
    least_squares_condition,
    least_squares_update,
    null_space,
    null_space_update,
    second_moment,
)
from lit_unlearn.core.key_sums import MANY, KeySums
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.solvers import LeastSquares, Retained, Solver, Write, sums_of

D_OUT, D_IN, MANY_KEYS = 6, 20, 500
WEIGHT = normal(D_OUT, D_IN, seed=1)
MOMENT = second_moment(normal(50, 9, seed=2) @ normal(9, D_IN, seed=3))
KEYS, VALUES = normal(MANY_KEYS, D_IN, seed=4), normal(MANY_KEYS, D_OUT, seed=5)


def test_sums_are_those_over_all_keys() -> None:
    sums = KeySums.of(WEIGHT, KEYS, VALUES)
    assert_close(sums.moment, KEYS.T @ KEYS)
    assert_close(sums.residual, (VALUES.T - WEIGHT @ KEYS.T) @ KEYS)
    assert sums.num_keys == MANY_KEYS
    assert sums.moment.dtype == KeySums.of(WEIGHT.float(), KEYS.float(), VALUES.float()).residual.dtype == torch.float64


@pytest.mark.parametrize("own", [WEIGHT, normal(D_OUT, D_IN, seed=6), None])
def test_sums_for_anchors_are_those_for_their_outputs(own: Tensor | None) -> None:
    anchors = normal(MANY_KEYS, D_IN, seed=8)
    sums = KeySums.of_anchors(WEIGHT, KEYS, anchors, own)
    whole = KeySums.of(WEIGHT, KEYS, anchors @ (WEIGHT if own is None else own).mT)
    assert torch.equal(sums.moment, whole.moment) and sums.num_keys == MANY_KEYS
    assert_close(sums.residual, whole.residual, rtol=0, atol=1e-12 * float(whole.residual.abs().max()))
    again = KeySums.of_anchors(WEIGHT, KEYS, anchors, own, sums.moment, sums.moved)
    assert torch.equal(again.residual, sums.residual) and again.moved is sums.moved


def test_few_keys_are_taken_as_they_are() -> None:
    few = MANY * D_IN
    retained = Retained(MOMENT, 50)
    for count in (few, few + 1):
        write = Write("layer", WEIGHT, torch.float32, KEYS[:count], VALUES[:count], retained)
        assert (sums_of(write) is None) is (count == few)


@pytest.mark.parametrize("rule", ["absolute", "mean_diagonal"])
@pytest.mark.parametrize("previous", [None, MOMENT])
def test_the_null_space_edit_from_sums(rule: Any, previous: Tensor | None) -> None:
    space, sums = null_space(MOMENT, 1e-10, "max"), KeySums.of(WEIGHT, KEYS, VALUES)
    settings = 0.3, rule, previous
    delta = null_space_update(WEIGHT, KEYS, VALUES, space, *settings)
    assert delta.norm() > 0.1
    assert_close(null_space_update(WEIGHT, KEYS, VALUES, space, *settings, sums=sums), delta, rtol=0, atol=1e-12)
    report = edit_report(WEIGHT, delta, KEYS, MOMENT, space, *settings)
    assert edit_report(WEIGHT, delta, KEYS, MOMENT, space, *settings, sums=sums) == pytest.approx(report, rel=1e-9)


def test_least_squares_from_sums() -> None:
    sums = KeySums.of(WEIGHT, KEYS, VALUES)
    settings = MOMENT, 0.5, 3.0
    delta = least_squares_update(WEIGHT, KEYS, VALUES, *settings)
    assert_close(least_squares_update(WEIGHT, KEYS, VALUES, *settings, sums=sums), delta, rtol=0, atol=1e-12)
    condition = least_squares_condition(KEYS, *settings)
    assert least_squares_condition(KEYS, *settings, sums=sums) == pytest.approx(condition)


def test_keys_within_the_retained_span_have_no_scale_from_sums_either() -> None:
    space, keys = null_space(MOMENT, 1e-10, "max"), normal(MANY_KEYS, 9, seed=7) @ normal(9, D_IN, seed=3)
    sums = KeySums.of(WEIGHT, keys, VALUES)
    with pytest.raises(ValueError, match="lie in the span of the retained keys"):
        null_space_update(WEIGHT, keys, VALUES, space, 1.0, "mean_diagonal", sums=sums)


class LargestFloat64(TorchDispatchMode):
    """Notes the most numbers that any tensor of float64 has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("solver", [NullSpace(1e-10, "max"), LeastSquares(0.5)])
def test_a_solver_never_holds_all_keys_in_float64(solver: Solver, values: bool) -> None:
    retained = Retained(MOMENT, 50)
    solver.prepare({"layer": retained}, lambda tasks: [task() for task in tasks], torch.device("cpu"))
    given = {"values": VALUES.float()} if values else {"values": None, "anchors": KEYS.flip(0).float()}
    write = Write("layer", WEIGHT, torch.float32, KEYS.float(), retained=retained, **given)
    with LargestFloat64() as seen:
        (solved,) = solver.solve([write])
    assert seen.most == D_IN * D_IN < KEYS.numel()
    assert solved.change.norm() > 0.1
