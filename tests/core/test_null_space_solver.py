"""The solver of the null-space edit: soft null spaces, forgetting of unused directions, and tolerances."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core import null_space_solver
from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.key_sums import KeySums
from lit_unlearn.core.null_space import null_space, soft_null_space
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.null_space_system import NullSpaceSystem, system_of
from lit_unlearn.core.solvers import Retained, Solved, UnsolvableError, Write, sums_of

D_IN, D_OUT = 10, 6


WEIGHT, KEYS, VALUES = normal(D_OUT, D_IN, seed=0), normal(5, D_IN, seed=1), normal(5, D_OUT, seed=2)
SCALES = torch.logspace(0, -4, D_IN, dtype=torch.float64)
KEPT = normal(40, D_IN, seed=3) * SCALES
"""Retained keys that use all directions, but the last ones hardly."""
RANK_4 = normal(40, 4, seed=4) @ normal(4, D_IN, seed=5)
"""Retained keys that leave six directions free."""


def solve(solver: NullSpace, kept: Tensor) -> Solved:
    retained = Retained(second_moment(kept), len(kept))
    write = Write("a.weight", WEIGHT, torch.float64, KEYS, VALUES, retained)
    solver.prepare({"a.weight": retained}, lambda calls: [call() for call in calls], torch.device("cpu"))
    (solved,) = solver.solve([write])
    return solved


@pytest.mark.parametrize("num_keys", [5, 50])  # an own system, and sums over many keys
def test_solves_with_the_same_tensor_of_keys_share_its_system_bit_for_bit(
    num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    retained = Retained(second_moment(KEPT), len(KEPT))
    keys, values = normal(num_keys, D_IN, seed=6), normal(num_keys, D_OUT, seed=7)
    built: list[int] = []

    def counting(*args: Any, **settings: Any) -> NullSpaceSystem:
        built.append(1)
        return system_of(*args, **settings)

    monkeypatch.setattr(null_space_solver, "system_of", counting)

    def changes(one_tensor: bool) -> list[Tensor]:
        solver, weight, found = NullSpace(0.1, ridge=0.1), WEIGHT, []
        solver.prepare({"a.weight": retained}, lambda calls: [call() for call in calls], torch.device("cpu"))
        for _ in range(3):  # rounds, each with a call of its own
            own = keys if one_tensor else keys.clone()
            (solved,) = solver.solve([Write("a.weight", weight, torch.float64, own, values, retained, shared=True)])
            found.append(solved.change)
            weight = weight + solved.change
        return found

    apart = changes(one_tensor=False)
    assert len(built) == 3
    shared = changes(one_tensor=True)
    assert len(built) == 4
    assert all(torch.equal(one, other) for one, other in zip(apart, shared, strict=True))
    assert not torch.equal(apart[0], apart[1])


def test_rounds_with_the_same_anchors_sum_them_once_and_give_what_their_outputs_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retained = Retained(second_moment(KEPT), len(KEPT))
    keys, anchors = normal(50, D_IN, seed=6), normal(50, D_IN, seed=7)
    known: list[bool] = []
    summed = KeySums.of_anchors

    def noting(*args: Any) -> KeySums:
        known.append(args[-1] is not None)
        return summed(*args)

    monkeypatch.setattr(KeySums, "of_anchors", noting)

    def changes(**given: Any) -> list[Tensor]:
        solver, weight, found = NullSpace(0.1, ridge=0.1), WEIGHT, []
        solver.prepare({"a.weight": retained}, lambda calls: [call() for call in calls], torch.device("cpu"))
        for _ in range(3):
            one = Write("a.weight", weight, torch.float64, keys, retained=retained, shared=True, **given)
            (solved,) = solver.solve([one])
            found.append(solved.change)
            weight = weight + solved.change
        anchors.mul_(2)  # noticed
        solver.solve([one])
        return found

    expected = changes(values=anchors @ WEIGHT.mT)
    anchors.div_(2)
    found = changes(values=None, anchors=anchors, anchor_weight=WEIGHT)
    assert known == [False, True, True, False]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-12 * expected[0].norm()


def prepared(*kept: Tensor) -> tuple[NullSpace, list[Retained]]:
    solver, retained = NullSpace(0.1), [Retained(second_moment(rows), len(rows)) for rows in kept]
    sites = {str(number): own for number, own in enumerate(retained)}
    solver.prepare(sites, lambda calls: [call() for call in calls], torch.device("cpu"))
    return solver, retained


def write(keys: Tensor, retained: Retained, shared: bool = True) -> Write:
    return Write("a", WEIGHT, torch.float64, keys, VALUES, retained, shared=shared)


def test_a_system_is_kept_only_for_writes_that_share_their_keys() -> None:
    solver, (retained,) = prepared(KEPT)
    solver.solve([write(KEYS, retained, shared=False)])
    assert solver.systems == []
    solver.solve([write(KEYS, retained)])
    assert len(solver.systems) == 1
    solver.forget()
    assert solver.systems == []
    pickle.dumps(solver)


def test_a_system_is_forgotten_with_its_keys_or_for_other_retained_keys() -> None:
    solver, retained = prepared(KEPT, RANK_4)
    keys = KEYS.clone()
    for own in retained:
        solver.solve([write(keys, own)])
    assert [shared.retained for shared in solver.systems] == retained
    del keys
    solver.solve([write(KEYS, retained[0])])
    assert len(solver.systems) == 1


@pytest.mark.parametrize("change", ["keys", "ridge", "rule"])
def test_a_system_does_not_outlive_a_change(change: str) -> None:
    solver, (retained,) = prepared(KEPT)
    keys = KEYS.clone()
    (before,) = solver.solve([write(keys, retained)])
    if change == "keys":
        keys.mul_(3)
    elif change == "ridge":
        solver.ridge = 100.0
    else:
        solver.ridge_rule = "mean_diagonal"
    (after,) = solver.solve([write(keys, retained)])
    fresh, (own,) = prepared(KEPT)
    fresh.ridge, fresh.ridge_rule = solver.ridge, solver.ridge_rule
    (expected,) = fresh.solve([write(keys, own)])
    assert torch.equal(after.change, expected.change)
    assert not torch.allclose(after.change, before.change, rtol=1e-3)


def gradient(change: Tensor, objective: Any) -> Tensor:
    free = change.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(objective(free), [free])
    return found


def test_a_soft_projector_is_the_share_that_retained_keys_do_not_use() -> None:
    moment = second_moment(KEPT)
    space = soft_null_space(moment, 0.1)
    c = 0.1 * moment.trace() / D_IN
    assert space.cutoff == pytest.approx(float(c), rel=1e-12)
    expected = c * torch.linalg.inv(moment + c * torch.eye(D_IN, dtype=torch.float64))
    assert_close(space.projection, expected, rtol=1e-9, atol=1e-12)
    hard = null_space(moment, 0.1, "mean")
    assert space.dimension == hard.dimension  # directions that are at least half free
    small = soft_null_space(second_moment(RANK_4), 1e-9).projection  # without a compromise the two agree
    assert_close(small, null_space(second_moment(RANK_4), 1e-6, "mean").projection, rtol=0, atol=1e-6)


def test_a_soft_edit_minimises_its_objective() -> None:
    change = solve(NullSpace(0.1, "soft", ridge=None), KEPT).change
    c = 0.1 * second_moment(KEPT).trace() / D_IN

    def objective(delta: Tensor) -> Tensor:
        edited = (KEYS @ (WEIGHT + delta).mT - VALUES).square().sum()
        return edited + (KEPT @ delta.mT).square().sum() + c * delta.square().sum()

    assert gradient(change, objective).abs().max() < 1e-9 * gradient(torch.zeros_like(change), objective).abs().max()


def test_forgetting_first_pulls_the_weight_to_zero_instead() -> None:
    change = solve(NullSpace(0.1, "soft", ridge=None, forget_unused=True), KEPT).change
    c = 0.1 * second_moment(KEPT).trace() / D_IN

    def objective(delta: Tensor) -> Tensor:
        edited = (KEYS @ (WEIGHT + delta).mT - VALUES).square().sum()
        return edited + (KEPT @ delta.mT).square().sum() + c * (WEIGHT + delta).square().sum()

    assert gradient(change, objective).abs().max() < 1e-9 * gradient(torch.zeros_like(change), objective).abs().max()


def test_what_no_retained_key_uses_is_gone_and_retained_outputs_stay() -> None:
    change = solve(NullSpace(1e-6, "mean", ridge=1e-6, forget_unused=True), RANK_4).change
    new = WEIGHT + change
    assert_close(RANK_4 @ new.mT, RANK_4 @ WEIGHT.mT, rtol=0, atol=1e-9)
    assert_close(KEYS @ new.mT, VALUES, rtol=0, atol=1e-4)
    # A key that is neither in the span of the retained keys nor in that of the edited ones has no output.
    span = torch.linalg.qr(torch.cat([RANK_4[:4], KEYS]).mT)[0]
    unused = normal(1, D_IN, seed=6)
    unused = unused - (unused @ span) @ span.mT
    assert (unused @ WEIGHT.mT).norm() > 0.1
    assert (unused @ new.mT).norm() < 1e-6


@pytest.mark.parametrize("rule", ["mean", "soft"])
@pytest.mark.parametrize("forget_unused", [False, True])
def test_a_tolerance_takes_the_widest_null_space_that_keeps_it(rule: Any, forget_unused: bool) -> None:
    settings: dict[str, Any] = {"rule": rule, "ridge": 1.0, "forget_unused": forget_unused}
    widest = solve(NullSpace(2.0, **settings), KEPT)
    tolerance = 0.3 * widest.report["leak"]
    found = solve(NullSpace(2.0, tolerance=tolerance, **settings), KEPT)
    assert found.report["leak"] <= tolerance
    again = solve(NullSpace(found.report["cutoff"], **settings), KEPT)  # the reported cutoff makes the same edit
    assert_close(again.change, found.change, rtol=1e-9, atol=1e-12)
    wider = found.report["cutoff"] * (1.16 if rule == "soft" else 1.0)
    if rule == "mean":  # one more direction
        moment = second_moment(KEPT)
        values = torch.linalg.eigvalsh(moment)
        wider = float(values[values > found.report["cutoff"] * values.mean()].min() / values.mean()) * 1.001
    assert solve(NullSpace(wider, **settings), KEPT).report["leak"] > tolerance
    loose = solve(NullSpace(2.0, tolerance=2 * widest.report["leak"], **settings), KEPT)
    assert_close(loose.change, widest.change, rtol=1e-9, atol=1e-12)


def test_the_search_for_a_tolerance_sums_many_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    retained = Retained(second_moment(KEPT), len(KEPT))
    one = Write("a", WEIGHT, torch.float64, normal(50, D_IN, seed=6), normal(50, D_OUT, seed=7), retained)
    calls: list[int] = []
    monkeypatch.setattr(null_space_solver, "sums_of", lambda *given: calls.append(1) or sums_of(*given))
    solver = NullSpace(2.0, tolerance=0.01)
    solver.prepare({"a": retained}, lambda tasks: [task() for task in tasks], torch.device("cpu"))
    (solved,) = solver.solve([one])
    assert len(calls) == 1 and 0 < solved.report["leak"] <= 0.01


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"edit\.minimum=3 has no effect with rule=soft"):
        NullSpace(rule="soft", minimum=3)
    with pytest.raises(ValueError, match=r"edit\.ridge=null is possible with rule=soft"):
        NullSpace(ridge=None)
    with pytest.raises(ValueError, match=r"edit\.tolerance=0 must be positive"):
        NullSpace(tolerance=0)
    with pytest.raises(UnsolvableError, match=r"a\.weight: edit\.tolerance=1e-12 is less than .*: raise it"):
        solve(NullSpace(2.0, tolerance=1e-12), KEPT)
    with pytest.raises(UnsolvableError, match="threshold=0 must be positive for rule='soft'"):
        solve(NullSpace(0, "soft"), KEPT)
