"""Few retained keys of a wide layer: their moment and their null space, without a matrix of d_in x d_in.

With r keys and r < d_in, ``K0 K0^T`` is kept as K0 itself, and its null space by the r directions V that keys use: a
direction of eigenvalue e is free to the share f (0 or 1 with a cut, ``c / (e + c)`` in a soft null space), and all that
are orthogonal to V are free entirely, so ``P = I - V (1 - f) V^T`` and its symmetric root is
``F = I - V (1 - sqrt(f)) V^T``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lit_unlearn.core.matrices import checked_matrix
from lit_unlearn.core.null_space import (
    NullSpaceBasis,
    NullSpaceRule,
    chosen_cut,
    null_space_from_keys,
    soft_cutoff,
)


@dataclass(frozen=True, eq=False)
class ThinMoment:
    """``K0 K0^T`` of few keys.

    Attributes:
        rows: K0 transposed, (r, d_in), float64; a key that counts c times is scaled by the root of c.
    """

    rows: Tensor

    def to(self, like: Tensor | torch.device) -> ThinMoment:
        """The same on another device."""
        return ThinMoment(self.rows.to(like))

    @property
    def dense(self) -> Tensor:
        """K0 K0^T, (d_in, d_in)."""
        return self.rows.mT @ self.rows


Moment: TypeAlias = Tensor | ThinMoment
"""``K0 K0^T``, as a matrix (d_in, d_in) or by its keys."""


def dense(moment: Moment) -> Tensor:
    """``K0 K0^T`` as a matrix, (d_in, d_in)."""
    return moment.dense if isinstance(moment, ThinMoment) else moment


@dataclass(frozen=True, eq=False)
class ThinNullSpace:
    """The null space of few keys, as `null_space.NullSpaceBasis` but by the directions that it lacks.

    Attributes:
        used: V, the directions that retained keys use, orthonormal columns, (d_in, r), float64, r < d_in.
        eigenvalues: All eigenvalues of K0 K0^T, (d_in,), ascending; the first d_in - r are zero, the others belong to
            the columns of ``used``.
        cutoff: As in ``NullSpaceBasis``.
        dimension: Number of free directions k >= d_in - r; of a soft null space, those that are at least half free.
        is_soft: Whether it has no cut.
    """

    used: Tensor
    eigenvalues: Tensor
    cutoff: float
    dimension: int
    is_soft: bool = False

    @cached_property
    def own(self) -> Tensor:
        """Eigenvalues of the directions V, (r,)."""
        return self.eigenvalues[len(self.eigenvalues) - self.used.shape[1] :]

    @cached_property
    def free(self) -> Tensor:
        """Share of each direction of V that is free, f, (r,)."""
        if self.is_soft:
            return self.cutoff / (self.own + self.cutoff)
        return (torch.arange(len(self.own), device=self.own.device) < self._free_columns).to(self.own)

    @property
    def _free_columns(self) -> int:
        return self.dimension - len(self.used) + self.used.shape[1]

    @property
    def projection(self) -> Tensor:
        """P, (d_in, d_in), float64."""
        identity = torch.eye(len(self.used), dtype=self.used.dtype, device=self.used.device)
        return identity - (self.used * (1 - self.free)) @ self.used.mT

    def to(self, like: Tensor) -> ThinNullSpace:
        """The same on the device of ``like``."""
        return replace(self, used=self.used.to(like), eigenvalues=self.eigenvalues.to(like))

    def rooted(self, rows: Tensor) -> Tensor:
        """``rows @ F`` for rows (n, d_in), where F F = P."""
        return rows - ((rows @ self.used) * (1 - self.free.sqrt())) @ self.used.mT

    def across(self, rows: Tensor) -> Tensor:
        """``rows @ (I - P)`` for rows (n, d_in): what of them is not free."""
        return ((rows @ self.used) * (1 - self.free)) @ self.used.mT

    def span(self) -> Tensor:
        """Orthonormal columns that span what is less than half free, (d_in, d_in - dimension)."""
        return self.used[:, self._free_columns :]

    def cut(self) -> ThinNullSpace:
        """With a cut: of a soft null space, the directions that are at least half free, entirely."""
        return replace(self, is_soft=False)

    def narrowed(self, cutoff: float) -> ThinNullSpace:
        """The null space of the same keys for a smaller ``cutoff``, which is positive."""
        dimension = int((self.eigenvalues < cutoff).sum())
        return replace(self, cutoff=cutoff, dimension=min(dimension, self.dimension))

    def narrower_cutoffs(self) -> list[float]:
        """As in ``NullSpaceBasis``, but what no key uses stays free, since an edit there moves no retained output."""
        if self.is_soft:
            return [self.cutoff * 10 ** (step / 16 - 4) for step in range(65)]
        return [float(value) for value in self.own[: self._free_columns] if value > 0] + [self.cutoff]

    def as_basis(self) -> NullSpaceBasis:
        """By a basis of the free directions, (d_in, k): for systems that are as large as that."""
        whole, _ = torch.linalg.qr(self.used, mode="complete")
        columns = self.used * self.free.sqrt()
        basis = torch.cat(
            [whole[:, self.used.shape[1] :], columns if self.is_soft else columns[:, : self._free_columns]], 1
        )
        return NullSpaceBasis(basis, self.eigenvalues, self.cutoff, self.is_soft)


NullSpaceOfKeys: TypeAlias = NullSpaceBasis | ThinNullSpace
"""A null space by the directions that it has or by those that it lacks."""


def thin_null_space(
    moment: ThinMoment, threshold: float, rule: NullSpaceRule, num_keys: int | None = None, minimum: int = 0
) -> NullSpaceOfKeys:
    """As `null_space.null_space`, of few keys.

    Args:
        moment: K0 K0^T by its keys, fewer than d_in.
        threshold: As in ``null_space``, as the next three.
        rule: Which eigenvalues count as zero.
        num_keys: Number of keys, for ``absolute``.
        minimum: Least number of directions.

    Returns:
        By the directions that it lacks; by a basis if ``count`` frees fewer directions than no key uses.

    Raises:
        EmptyNullSpaceError: As in ``null_space``.
        ValueError: As in ``null_space``.
    """
    used, eigenvalues = thin_spectrum(moment)
    dimension, cutoff = chosen_cut(eigenvalues, threshold, rule, num_keys, minimum)
    if dimension < len(used) - used.shape[1]:
        return null_space_from_keys(moment.rows, threshold, rule, num_keys, minimum)
    return ThinNullSpace(used, eigenvalues, cutoff, dimension)


def thin_soft_null_space(moment: ThinMoment, threshold: float) -> ThinNullSpace:
    """As `null_space.soft_null_space`, of few keys.

    Args:
        moment: K0 K0^T by its keys, fewer than d_in.
        threshold: c in units of the mean eigenvalue, positive.

    Raises:
        ValueError: As in ``soft_null_space``.
    """
    used, eigenvalues = thin_spectrum(moment)
    cutoff = soft_cutoff(eigenvalues, threshold)
    return ThinNullSpace(used, eigenvalues, cutoff, int((eigenvalues < cutoff).sum()), is_soft=True)


def thin_spectrum(moment: ThinMoment) -> tuple[Tensor, Tensor]:
    """The directions that keys use, (d_in, r), and all eigenvalues of their moment, (d_in,); both ascending."""
    rows = checked_matrix("moment", moment.rows, (None, None))
    _, singular_values, directions = torch.linalg.svd(rows, full_matrices=False)
    eigenvalues = singular_values.new_zeros(rows.shape[1])
    eigenvalues[: len(singular_values)] = singular_values.square()
    return directions.flip(0).mT, eigenvalues.flip(0)


def outputs_energy(matrix: Tensor, moment: Moment) -> Tensor:
    """``||A K0||^2`` for A (d_out, d_in), not negative."""
    if isinstance(moment, ThinMoment):
        return (matrix @ moment.rows.mT).square().sum()
    return ((matrix @ moment) * matrix).sum().clamp_min(0)


__all__ = [
    "Moment",
    "NullSpaceOfKeys",
    "ThinMoment",
    "ThinNullSpace",
    "dense",
    "outputs_energy",
    "thin_null_space",
    "thin_soft_null_space",
    "thin_spectrum",
]
