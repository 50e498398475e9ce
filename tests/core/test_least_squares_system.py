"""The system of a least-squares edit: its condition number from the two ends of its spectrum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core import least_squares_system
from lit_unlearn.core.least_squares_system import SMALL, LeastSquaresSystem, largest_eigenvalue

D_IN = SMALL + 64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(num_keys: int, decades: float, seed: int) -> Tensor:
    keys = normal(num_keys, D_IN, seed=seed) * torch.logspace(0, -decades, D_IN, dtype=torch.float64)
    return keys.mT @ keys


@pytest.mark.parametrize("num_keys", [5, 4 * D_IN])  # directions that only the ridge determines, or none
@pytest.mark.parametrize("decades", [0.0, 2.0])
@pytest.mark.parametrize(("ridge", "retain_weight"), [(1e-2, 1.0), (10.0, 15.0), (1.0, 0.0)])
def test_the_condition_number_is_that_of_all_eigenvalues(
    num_keys: int, decades: float, ridge: float, retain_weight: float
) -> None:
    system = LeastSquaresSystem(moment(20, 0.0, seed=1), moment(num_keys, decades, seed=2), ridge, retain_weight)
    spectrum = torch.linalg.eigvalsh(system.matrix)
    assert system.condition_number == pytest.approx(float(spectrum[-1] / spectrum[0]), rel=1e-8)


def test_all_eigenvalues_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    system = LeastSquaresSystem(moment(20, 0.0, seed=1), moment(D_IN, 2.0, seed=2), 1e-2, 1.0)

    def refuse(matrix: Tensor) -> float:
        raise AssertionError(matrix.shape)

    monkeypatch.setattr(least_squares_system, "condition_number", refuse)
    assert system.condition_number > 1


def test_the_solve_is_that_of_the_matrix() -> None:
    system = LeastSquaresSystem(moment(20, 0.0, seed=1), moment(D_IN, 1.0, seed=2), 0.5, 2.0)
    right = normal(7, D_IN, seed=3)
    assert_close(system.solve(right) @ system.matrix, right, rtol=1e-9, atol=1e-9)


def test_a_singular_system_has_an_infinite_condition_number_or_one_of_its_rounding() -> None:
    found = LeastSquaresSystem(torch.zeros(D_IN, D_IN, dtype=torch.float64), moment(5, 0.0, seed=2), 0.0, 1.0)
    assert found.condition_number > 1e14
    nothing = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    assert LeastSquaresSystem(nothing, nothing, 0.0, 1.0).condition_number == math.inf


def test_lanczos_finds_a_multiple_eigenvalue_and_says_where_it_does_not_end() -> None:
    values = torch.cat([torch.ones(D_IN - 3), torch.full((3,), 7.0)]).double()
    assert largest_eigenvalue(lambda column: values[:, None] * column, values) == pytest.approx(7.0, rel=1e-12)
    assert largest_eigenvalue(lambda column: 3 * column, values) == pytest.approx(3.0, rel=1e-12)
    spread = torch.linspace(1, 2, D_IN, dtype=torch.float64)
    assert largest_eigenvalue(lambda column: spread[:, None] * column, spread, most_steps=8) is None
