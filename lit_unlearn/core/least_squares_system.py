"""The symmetric system of a least-squares edit, factorised once for its solve and its report.

Its condition number takes the two ends of its spectrum only: Lanczos' method finds the largest eigenvalue of the matrix
and, by the factor that the solve has, that of its inverse, each from some tens of products with a vector instead of all
eigenvalues (Golub & Van Loan, 2013, section 10.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from lit_unlearn.core.matrices import (
    SingularSystemError,
    check_nonnegative,
    checked_moment,
    cholesky_factor,
    condition_number,
)
from lit_unlearn.core.seeds import seeded

ACCURACY = 1e-10
"""Bound on the relative error of an end of a spectrum that Lanczos' method may leave."""
MOST_STEPS = 96
"""Steps after which all eigenvalues are computed instead: then they cost no more than further steps."""
SMALL = 256
"""Size up to which all eigenvalues are computed."""


class LeastSquaresSystem:
    """``retain_weight K0 K0^T + K1 K1^T + ridge I``, (d_in, d_in); see `closed_form.least_squares_update`.

    Args:
        edited_moment: K1 K1^T, (d_in, d_in), float64.
        retained_moment: K0 K0^T, (d_in, d_in).
        ridge: Weight of the size penalty.
        retain_weight: Weight of the retained keys.

    Raises:
        ValueError: A weight is negative, or ``retained_moment`` is not a moment of d_in inputs.
    """

    def __init__(self, edited_moment: Tensor, retained_moment: Tensor, ridge: float, retain_weight: float) -> None:
        check_nonnegative("ridge", ridge)
        check_nonnegative("retain_weight", retain_weight)
        moment = checked_moment("retained_moment", retained_moment, edited_moment.shape[1], edited_moment.device)
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        self.ridge = ridge
        self.matrix = retain_weight * moment + edited_moment + ridge * identity
        """The symmetric matrix of the system."""

    @cached_property
    def lower(self) -> Tensor:
        """L with ``L L^T`` = the system's matrix.

        Raises:
            SingularSystemError: The ridge is too small.
        """
        return cholesky_factor(self.matrix, "ridge", self.ridge)

    def solve(self, right: Tensor) -> Tensor:
        """``right @ matrix^-1`` for ``right`` (d_out, d_in).

        Raises:
            SingularSystemError: The ridge is too small.
        """
        return torch.cholesky_solve(right.mT, self.lower).mT

    @cached_property
    def condition_number(self) -> float:
        """Condition number of the matrix, to a relative 1e-9 or its rounding; infinite if it is singular."""
        if len(self.matrix) > SMALL:
            try:
                lower = self.lower
            except SingularSystemError:
                return condition_number(self.matrix)
            largest = largest_eigenvalue(lambda column: self.matrix @ column, self.matrix)
            inverse = largest and largest_eigenvalue(partial(_solved, lower), self.matrix)
            if largest and inverse:
                return largest * inverse
        return condition_number(self.matrix)


def _solved(lower: Tensor, column: Tensor) -> Tensor:
    """``(L L^T)^-1 @ column``; for one column that takes a small part of the time of ``cholesky_solve``."""
    half = torch.linalg.solve_triangular(lower, column, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor, most_steps: int = MOST_STEPS) -> float | None:
    """Largest eigenvalue of a symmetric positive definite map by Lanczos' method, with full reorthogonalisation.

    Args:
        apply: The map, from (d, 1) to (d, 1).
        like: Gives the size d, the type and the device.
        most_steps: Bound on the number of its calls.

    Returns:
        The eigenvalue to a relative ``ACCURACY``, or None if that takes more steps.
    """
    size = len(like)
    found = like.new_empty(most_steps, size)
    column = torch.randn(size, dtype=like.dtype, generator=seeded("spectrum")).to(like.device)
    found[0] = column / column.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(most_steps):
        image = apply(found[step].unsqueeze(1)).squeeze(1)
        diagonal.append(float(found[step] @ image))
        for _ in range(2):  # twice is enough
            image = image - found[: step + 1].mT @ (found[: step + 1] @ image)
        rest = float(image.norm())
        if step % 4 == 3 or step + 1 == size or rest <= ACCURACY * abs(diagonal[0]):
            ends = torch.tensor(beside, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(
                torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(ends, 1) + torch.diag(ends, -1)
            )
            top, gap = float(values[-1]), float(values[-1] - values[-2]) if step else math.inf
            left = rest * abs(float(vectors[-1, -1]))  # the residual's norm, a bound on the error
            if min(left, left * left / gap if gap > left else math.inf) <= ACCURACY * top:
                return top
        if step + 1 < most_steps:
            beside.append(rest)
            found[step + 1] = image / rest
    return None
