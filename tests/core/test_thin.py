"""Few retained keys of a wide layer: moments and null spaces without a matrix of inputs by inputs."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.null_space import EmptyNullSpaceError, null_space, soft_null_space
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.null_space_system import NullSpaceSystem, ThinSystem, system_of
from lit_unlearn.core.reach import reach_report, retained_directions
from lit_unlearn.core.retained_outputs import energy
from lit_unlearn.core.solvers import LeastSquares, Retained, RidgeMap, Solver, Write
from lit_unlearn.core.thin import (
    ThinMoment,
    ThinNullSpace,
    dense,
    outputs_energy,
    thin_null_space,
    thin_soft_null_space,
)

D_IN, D_OUT, KEPT = 40, 12, 15


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = torch.logspace(0, -4, KEPT, dtype=torch.float64)[:, None] * normal(KEPT, D_IN, seed=0)
THIN = ThinMoment(ROWS)
MOMENT = ROWS.mT @ ROWS
WEIGHT = normal(D_OUT, D_IN, seed=1)
RULES: list[tuple[str, float]] = [("mean", 1e-2), ("max", 1e-2), ("absolute", 1e-2), ("energy", 0.99), ("count", 30)]


@pytest.mark.parametrize(("rule", "threshold"), RULES)
def test_a_null_space_by_what_it_lacks_is_that_of_the_moment(rule: Any, threshold: float) -> None:
    thin, whole = (
        find(given, threshold, rule, KEPT) for find, given in ((thin_null_space, THIN), (null_space, MOMENT))
    )
    assert isinstance(thin, ThinNullSpace) and thin.used.shape == (D_IN, KEPT)
    assert D_IN - KEPT <= thin.dimension == whole.dimension < D_IN
    assert_close(thin.projection, whole.projection, rtol=0, atol=1e-9)
    assert_close(thin.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=1e-12)
    assert thin.cutoff == pytest.approx(whole.cutoff, rel=1e-9)
    assert_close(thin.as_basis().projection, whole.projection, rtol=0, atol=1e-9)
    assert_close(thin.span() @ thin.span().mT + whole.projection, torch.eye(D_IN).double(), rtol=0, atol=1e-9)
    rows = normal(3, D_IN, seed=2)
    assert_close(thin.rooted(thin.rooted(rows)), rows @ whole.projection, rtol=0, atol=1e-9)
    assert_close(thin.across(rows), rows - rows @ whole.projection, rtol=0, atol=1e-9)


def test_a_soft_null_space_by_what_it_lacks_is_that_of_the_moment() -> None:
    thin, whole = thin_soft_null_space(THIN, 1e-2), soft_null_space(MOMENT, 1e-2)
    assert_close(thin.projection, whole.projection, rtol=0, atol=1e-10)
    assert thin.dimension == whole.dimension and 0 < float(thin.free.min()) < float(thin.free.max()) < 1
    for mine, theirs in (
        (thin.cut(), whole.cut()),
        (thin.narrowed(1e-4), whole.narrowed(1e-4)),
        (thin.as_basis(), whole),
    ):
        assert_close(mine.projection, theirs.projection, rtol=0, atol=1e-9)
    rows = normal(3, D_IN, seed=2)
    assert_close(thin.rooted(thin.rooted(rows)), rows @ whole.projection, rtol=0, atol=1e-10)


def test_fewer_directions_than_no_key_uses_need_a_basis() -> None:
    space = thin_null_space(THIN, 5, "count")
    assert not isinstance(space, ThinNullSpace) and space.dimension == 5
    assert float((ROWS @ space.basis).norm()) < 1e-12


def test_errors_are_those_of_a_moment() -> None:
    with pytest.raises(ValueError, match="threshold=2 must lie strictly between 0 and 1 for rule='energy'"):
        thin_null_space(THIN, 2, "energy")
    for find in (lambda none: thin_null_space(none, 0.1, "mean"), lambda none: thin_soft_null_space(none, 0.1)):
        with pytest.raises(ValueError, match="There are no retained keys, or all are zero"):
            find(ThinMoment(0 * ROWS))
    with pytest.raises(EmptyNullSpaceError):
        thin_null_space(ThinMoment(normal(D_IN, D_IN, seed=3)), 1e-9, "max")


def test_outputs_of_few_keys() -> None:
    expected = float((WEIGHT @ ROWS.mT).square().sum())
    assert float(outputs_energy(WEIGHT, THIN)) == pytest.approx(expected, rel=1e-13)
    assert float(outputs_energy(WEIGHT, MOMENT)) == pytest.approx(expected, rel=1e-12)
    assert energy(WEIGHT, THIN) == pytest.approx(expected, rel=1e-13)
    assert energy(WEIGHT, THIN, torch.float32) == pytest.approx(expected, rel=1e-6)
    assert_close(dense(THIN), MOMENT) and dense(MOMENT) is MOMENT


@pytest.mark.parametrize("soft", [False, True])
def test_the_system_has_no_matrix_of_all_inputs(soft: bool) -> None:
    space = thin_soft_null_space(THIN, 1e-2) if soft else thin_null_space(THIN, 1e-2, "mean")
    keys, residual = normal(5, D_IN, seed=4), normal(D_OUT, 5, seed=5)
    system = system_of(keys, space, 0.3)
    assert isinstance(system, ThinSystem) and system.matrix.shape == (5, 5)
    assert all(value.shape != (D_IN, D_IN) for value in vars(system).values() if isinstance(value, Tensor))
    P = space.projection
    expected = residual @ torch.linalg.inv(keys @ P @ keys.mT + 0.3 * torch.eye(5).double()) @ keys @ P
    found = system.coefficients(residual)
    assert_close(system.change(found), expected, rtol=0, atol=1e-10)
    moved = system.change(found, space.own)
    assert_close(moved, expected @ MOMENT, rtol=1e-7, atol=1e-8 if soft else 1e-9)
    # With more edited keys than free directions, a system over a basis of these is smaller.
    many = system_of(normal(60, D_IN, seed=6), space, 0.3)
    assert type(many) is NullSpaceSystem and len(many.matrix) == many.factor.shape[1] <= D_IN


SOLVERS: dict[str, Any] = {
    "mean": lambda: NullSpace(1e-2, ridge=0.5),
    "scaled": lambda: NullSpace(1e-2, ridge=0.5, ridge_rule="mean_diagonal"),
    "minimum": lambda: NullSpace(1e-9, ridge=0.5, minimum=32),
    "soft": lambda: NullSpace(1e-2, rule="soft", ridge=None),
    "forget": lambda: NullSpace(1e-2, ridge=0.5, forget_unused=True),
    "forget soft": lambda: NullSpace(1e-2, rule="soft", forget_unused=True),
    "tolerance": lambda: NullSpace(10.0, ridge=1e-3, tolerance=1e-3),
    "tolerance soft": lambda: NullSpace(1.0, rule="soft", ridge=30.0, tolerance=0.1),
    "least squares": lambda: LeastSquares(ridge=0.5),
    "mean least squares": lambda: LeastSquares(ridge=0.5, moment="mean"),
    "ridge map": lambda: RidgeMap(),
}


def solved(solver: Solver, moment: Tensor | ThinMoment, num_keys: int) -> tuple[Tensor, dict[str, float]]:
    retained = Retained(moment, KEPT, prompts=KEPT, largest_norm=6.0)
    keys, values = normal(num_keys, D_IN, seed=7), normal(num_keys, D_OUT, seed=8)
    write = Write("a.weight", WEIGHT, torch.float32, keys, values, retained)
    sites = {"a.weight": retained}
    solver.prepare(sites, lambda calls: [call() for call in calls], torch.device("cpu"), {"a.weight": WEIGHT})
    (found,) = solver.solve([write])
    span = solver.null_space_of(retained)
    reached = reach_report(write, WEIGHT, retained_directions(moment) if span is None else span)
    return found.change, found.report | reached


@pytest.mark.parametrize("num_keys", [6, 200])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gives_the_same_with_the_keys_as_with_their_moment(name: str, num_keys: int) -> None:
    (change, report), (expected, expected_report) = (solved(SOLVERS[name](), one, num_keys) for one in (THIN, MOMENT))
    assert_close(change, expected, rtol=1e-6, atol=1e-8)
    assert report.keys() == expected_report.keys() and "reach" in report
    for entry, value in expected_report.items():
        assert report[entry] == pytest.approx(value, rel=1e-5, abs=1e-7), entry


def test_a_null_space_lives_as_long_as_its_retained_keys() -> None:
    solver, retained = NullSpace(1e-2), {"a": Retained(THIN, KEPT), "b": Retained(MOMENT, KEPT)}
    solver.prepare(retained, lambda calls: [call() for call in calls], torch.device("cpu"))
    assert len(pickle.loads(pickle.dumps(solver)).null_spaces) == len(solver.null_spaces) == 2
    del retained["a"]
    assert [type(space).__name__ for space in solver.null_spaces.values()] == ["NullSpaceBasis"]
