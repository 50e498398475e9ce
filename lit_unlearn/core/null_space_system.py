"""The symmetric system of a null-space edit, which maps with the same keys and the same null space share.

Names are those of ``closed_form.py``: keys are rows, K1 is ``keys.mT``, and P = U U^T.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_unlearn.core.matrices import (
    check_nonnegative,
    checked_matrix,
    checked_moment,
    cholesky_factor,
    condition_number,
)
from lit_unlearn.core.null_space import NullSpaceBasis
from lit_unlearn.core.thin import NullSpaceOfKeys, ThinNullSpace

RidgeRule = Literal["absolute", "mean_diagonal"]


class NullSpaceSystem:
    """The system that `null_space_update` solves and `edit_report` reports on, factorised once.

    It does not depend on the weight or on the values, so maps with the same keys and the same null space share it.

    Args:
        keys: K1 transposed, (n, d_in).
        projection: As in `null_space_update`, as the next three.
        ridge: Weight of the size penalty.
        ridge_rule: What it is relative to.
        previous_moment: Kp Kp^T of earlier edits, (d_in, d_in).
        moment: K1 K1^T, (d_in, d_in), used instead of the keys if there are many; only their number is then read.

    Raises:
        ValueError: As in `null_space_update`.
    """

    def __init__(
        self,
        keys: Tensor,
        projection: NullSpaceBasis | Tensor,
        ridge: float = 1.0,
        ridge_rule: RidgeRule = "absolute",
        previous_moment: Tensor | None = None,
        moment: Tensor | None = None,
    ) -> None:
        self.ridge, self.by_keys = ridge, False
        self.space: NullSpaceOfKeys | None = None if isinstance(projection, Tensor) else projection
        """The null space that the system belongs to, in the form that ``in_basis`` refers to."""
        if moment is not None:
            self.factor = _projection_factor(projection, moment)
            inner = (self.factor.mT @ moment) @ self.factor
            self.keys_kept = float((inner.trace().clamp(min=0.0) / moment.trace()).sqrt())
            least = moment.shape[1] * torch.finfo(inner.dtype).eps * moment.trace()
            scaled = _scaled_ridge(ridge, ridge_rule, inner.trace(), least, len(keys))
        else:
            keys = checked_matrix("keys", keys, (None, None))
            self.factor = _projection_factor(projection, keys)  # (d_in, k), U
            self.reduced = keys @ self.factor  # (n, k), K1^T U
            scaled = self._ridge_of(keys, ridge_rule)
            self.by_keys = previous_moment is None and len(keys) <= self.factor.shape[1]
            inner = self.reduced @ self.reduced.mT if self.by_keys else self.reduced.mT @ self.reduced
        self.matrix = _completed(inner, self.factor, scaled, previous_moment)
        """The symmetric matrix of the system, n x n over the keys or k x k over the basis."""

    @property
    def device(self) -> torch.device:
        """Where it is solved."""
        return self.matrix.device

    def _ridge_of(self, keys: Tensor, ridge_rule: RidgeRule) -> float:
        self.keys_kept = float(self.reduced.norm() / keys.norm())
        # Keys that are orthogonal up to rounding (eps times the length of a row) count as orthogonal.
        least = (keys.shape[1] * torch.finfo(keys.dtype).eps) ** 2 * keys.square().sum()
        return _scaled_ridge(self.ridge, ridge_rule, self.reduced.square().sum(), least, len(keys))

    @cached_property
    def lower(self) -> Tensor:
        """L with ``L L^T`` = the system's matrix."""
        return cholesky_factor(self.matrix, "ridge", self.ridge)

    @cached_property
    def condition_number(self) -> float:
        """Condition number of the system's matrix."""
        return condition_number(self.matrix)

    @cached_property
    def projected(self) -> Tensor:
        """K1^T P, (n, d_in)."""
        return self.reduced @ self.factor.mT

    def coefficients(self, residual: Tensor) -> Tensor:
        """The left factor of Delta, (d_out, n) over the projected keys or (d_out, k) over the basis; see ``change``.

        Args:
            residual: R, (d_out, n), float64.

        Raises:
            SingularSystemError: The ridge is too small.
        """
        right = residual if self.by_keys else residual @ self.reduced
        return torch.cholesky_solve(right.mT, self.lower).mT

    def coefficients_of_sums(self, residual: Tensor) -> Tensor:
        """As ``coefficients``, from R K1^T (d_out, d_in)."""
        return torch.cholesky_solve((residual @ self.factor).mT, self.lower).mT

    def in_basis(self, coefficients: Tensor) -> Tensor:
        """A (d_out, k) of ``Delta = A U^T``; columns whose eigenvalues are zero may be left out."""
        return coefficients @ self.reduced if self.by_keys else coefficients

    def change(self, coefficients: Tensor, scales: Tensor | None = None) -> Tensor:
        """``Delta = A U^T``, or ``A S U^T`` with the diagonal S = ``scales`` (k,)."""
        if not self.by_keys:
            return (coefficients if scales is None else coefficients * scales) @ self.factor.mT
        d_out, (num_keys, dimension), d_in = len(coefficients), self.reduced.shape, len(self.factor)
        reduced = self.reduced if scales is None else self.reduced * scales
        # Of the two orders of the product the one with fewer operations.
        if num_keys * d_in * (dimension + d_out) < d_out * dimension * (num_keys + d_in):
            return coefficients @ (self.projected if scales is None else reduced @ self.factor.mT)
        return (coefficients @ reduced) @ self.factor.mT


class ThinSystem(NullSpaceSystem):
    """The system over the edited keys, K1^T P K1, in a null space that is given by the directions that it lacks.

    Args:
        keys: K1 transposed, (n, d_in).
        space: The null space.
        ridge: Weight of the size penalty.
        ridge_rule: What it is relative to.
    """

    def __init__(
        self, keys: Tensor, space: ThinNullSpace, ridge: float = 1.0, ridge_rule: RidgeRule = "absolute"
    ) -> None:
        self.ridge, self.by_keys = ridge, True
        keys = checked_matrix("keys", keys, (None, len(space.used)))
        self.space = self.thin = space.to(keys)
        self.reduced = self.thin.rooted(keys)  # (n, d_in), K1^T F
        self.columns = self.thin.used * self.thin.free.sqrt()  # the part of F in V, (d_in, r)
        self.inside = keys @ self.columns  # (n, r)
        scaled = self._ridge_of(keys, ridge_rule)
        self.matrix = _with_ridge(self.reduced @ self.reduced.mT, scaled)

    @cached_property
    def projected(self) -> Tensor:
        """K1^T P, (n, d_in)."""
        return self.thin.rooted(self.reduced)

    def in_basis(self, coefficients: Tensor) -> Tensor:
        """As in ``NullSpaceSystem``, for the directions that retained keys use, (d_out, r)."""
        return coefficients @ self.inside

    def change(self, coefficients: Tensor, scales: Tensor | None = None) -> Tensor:
        """As in ``NullSpaceSystem``; with ``scales`` (r,), all that no retained key uses is scaled by zero."""
        if scales is None:
            return coefficients @ self.projected
        return ((coefficients @ self.inside) * scales) @ self.columns.mT


def system_of(
    keys: Tensor,
    projection: NullSpaceOfKeys | Tensor,
    ridge: float = 1.0,
    ridge_rule: RidgeRule = "absolute",
    previous_moment: Tensor | None = None,
    moment: Tensor | None = None,
) -> NullSpaceSystem:
    """The system of `NullSpaceSystem`, which takes the same arguments, also for a ``ThinNullSpace``."""
    if not isinstance(projection, ThinNullSpace):
        return NullSpaceSystem(keys, projection, ridge, ridge_rule, previous_moment, moment)
    if moment is None and previous_moment is None and len(keys) <= projection.dimension:
        return ThinSystem(keys, projection, ridge, ridge_rule)
    return NullSpaceSystem(keys, projection.as_basis(), ridge, ridge_rule, previous_moment, moment)


def _projection_factor(projection: NullSpaceBasis | Tensor, keys: Tensor) -> Tensor:
    """F with P = F F^T: the basis U, (d_in, k), or P itself, (d_in, d_in), since P = P P^T."""
    d_in = keys.shape[1]
    if isinstance(projection, NullSpaceBasis):
        return checked_matrix("projection.basis", projection.basis, (d_in, None), keys.device)
    matrix = checked_matrix("projection", projection, (d_in, d_in), keys.device)
    projected = keys @ matrix
    if (matrix - matrix.mT).abs().max() > 1e-5 or (projected @ matrix - projected).norm() > 1e-5 * keys.norm():
        raise ValueError(
            "projection is not an orthogonal projector (P = P^T = P P to 1e-5): pass null_space(...) itself."
        )
    return matrix


def _scaled_ridge(ridge: float, rule: RidgeRule, energy: Tensor, least: Tensor, count: int) -> float:
    """The ridge for ``count`` keys with ``energy``, ||P K1||^2; an energy of at most ``least`` counts as zero."""
    check_nonnegative("ridge", ridge)
    if rule not in get_args(RidgeRule):
        raise ValueError(f"ridge_rule={rule!r} is unknown; choose one of {', '.join(get_args(RidgeRule))}.")
    if rule == "absolute":
        return ridge
    if energy <= least:
        raise ValueError(
            "The edited keys lie in the span of the retained keys, so ridge_rule='mean_diagonal' has no scale: "
            "take prompts that share the concept out of the retained set, or use a larger null space."
        )
    return ridge * float(energy) / count


def _completed(system: Tensor, factor: Tensor, ridge: float, previous_moment: Tensor | None) -> Tensor:
    """Add the earlier edits, in the basis, and the ridge to ``system``."""
    if previous_moment is not None:
        previous = checked_moment("previous_moment", previous_moment, len(factor), factor.device)
        system = system + factor.mT @ previous @ factor
    return _with_ridge(system, ridge)


def _with_ridge(system: Tensor, ridge: float) -> Tensor:
    return system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
