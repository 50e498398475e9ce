"""Sizes of outputs at all retained keys, ``||A K0||`` with A = W or Delta, from their moment M = K0 K0^T.

``||A K0||^2 = tr(A M A^T)`` takes d_out d_in^2 products, more than many a solve. Two things make a report cheaper:

- W belongs to the model, so its size is computed once and carried over each edit:
  ``||(W + D) K0||^2 = ||W K0||^2 + 2 <W, D M> + ||D K0||^2``.
- An edit within the null space is ``Delta = A U^T`` with eigenvectors U of M, so ``Delta M = A L U^T`` with their
  eigenvalues L. Its stored form differs by a rest E, the rounding of the new weight, and
  ``||(Delta + E) K0||^2 = tr(A L U^T U A^T) + 2 <Delta M, E> + ||E K0||^2``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_unlearn.core.null_space_system import NullSpaceSystem
from lit_unlearn.core.thin import Moment, NullSpaceOfKeys, ThinMoment

BLOCK = 384
"""Inputs that are multiplied at a time."""
NEGLIGIBLE = 1e-7
"""Bound on the share of ||Delta K0||^2 that ||E K0||^2 may have without being computed: 5e-8 of the leak. As rounding
has no direction, its true share is smaller than the bound by the ratio of the largest eigenvalue to the mean."""
CARRIED = 2e-6
"""Bound on the share of ||W K0||^2 that may be lost when it is carried over an edit: 1e-6 of the leak."""


def energy(matrix: Tensor, moment: Moment, dtype: torch.dtype = torch.float64) -> float:
    """``||A K0||^2 = tr(A M A^T)`` with the products in ``dtype`` and the sums of blocks in float64.

    M is symmetric, so each of its blocks beside the diagonal is used for both sides: about half of the products.

    Args:
        matrix: A, (d_out, d_in).
        moment: M, (d_in, d_in), of which only the upper half is read; or K0 itself, if it has few keys.
        dtype: float64 where large terms cancel, as with a change within the null space.
    """
    matrix = matrix.to(dtype)
    if isinstance(moment, ThinMoment):
        return float((matrix @ moment.rows.to(dtype).mT).square().sum(dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, len(moment), BLOCK):
        own = matrix[:, start : start + BLOCK]
        columns = moment[: start + own.shape[1], start : start + BLOCK].to(dtype)
        outputs = torch.addmm(own @ columns[start:], matrix[:, :start], columns[:start], alpha=2)
        total += torch.linalg.vecdot(outputs, own).sum(dtype=torch.float64)
    return float(total.clamp(min=0.0))


def leak(delta: Tensor, weight: Tensor, moment: Moment, dtype: torch.dtype = torch.float64) -> float:
    """``||Delta K0|| / ||W K0||`` for any change, nan without retained keys; the size of W with products in ``dtype``.

    Args:
        delta: Delta, (d_out, d_in), float64.
        weight: W, (d_out, d_in), float64.
        moment: M, (d_in, d_in), float64.
        dtype: float32 moves the result by less than 1e-6 of itself, unless a GPU is set to multiply in TF32.
    """
    before = energy(weight, moment, dtype)
    return math.sqrt(energy(delta, moment) / before) if before else math.nan


class Known(NamedTuple):
    """``||W||^2``, by which a weight is recognised, and ``||W K0||^2``."""

    weight: float
    outputs: float


def known_of(weight: Tensor, moment: Moment) -> Known:
    """Both for W (d_out, d_in), float64, and M; the products are in float32, which moves the size by less than 1e-6."""
    return Known(_inner(weight, weight), energy(weight, moment, torch.float32))


class Solution(NamedTuple):
    """A change within a null space, as it was solved.

    Attributes:
        change: Delta, (d_out, d_in), before the new weight is rounded.
        coefficients: Its left factor, from ``NullSpaceSystem.coefficients``.
        system: The system that it solves.
        space: The null space, from the eigenvectors of the retained moment.
    """

    change: Tensor
    coefficients: Tensor
    system: NullSpaceSystem
    space: NullSpaceOfKeys


class RetainedOutputs:
    """``||W K0||^2`` of linear maps, each computed once; a weight is recognised by its name and its norm."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def remember(self, known: Mapping[str, Known]) -> None:
        """Take what ``known_of`` has found, by the names of the weights."""
        self._known.update(known)

    def energy(self, name: str, weight: Tensor, moment: Moment) -> float:
        """``||W K0||^2`` from memory if W (d_out, d_in) is the weight that it belongs to."""
        known = self._known.get(name)
        if known is None or not math.isclose(known.weight, _inner(weight, weight), rel_tol=1e-12):
            known = self._known[name] = known_of(weight, moment)
        return known.outputs

    def leak(self, name: str, weight: Tensor, delta: Tensor, moment: Moment, solution: Solution) -> float:
        """``||delta K0|| / ||W K0||``, where ``delta`` is the change of ``solution`` after rounding.

        Args:
            name: Name of the weight.
            weight: W before the edit, (d_out, d_in), float64.
            delta: Change of the stored weight, (d_out, d_in), float64.
            moment: M, (d_in, d_in).
            solution: What was solved.
        """
        before, space = self.energy(name, weight, moment), solution.space
        eigenvalues = space.eigenvalues.to(weight)
        own = space.own.to(weight)
        squares = solution.system.in_basis(solution.coefficients).square().sum(0)
        after = float((squares * own * space.free.to(weight)).sum())
        rest = delta - solution.change
        mapped = solution.system.change(solution.coefficients, own)  # Delta M
        after += 2 * _inner(mapped, rest)
        most = float(eigenvalues[-1]) * _inner(rest, rest)
        if most > NEGLIGIBLE * abs(after):
            most = energy(rest, moment, torch.float32)
            after += most
        after = max(after, 0.0)
        self._known.pop(name)
        if 2 * math.sqrt(most * before) <= CARRIED * before:  # 2 <W, E M> is not known
            square = _inner(weight, weight) + 2 * _inner(weight, delta) + _inner(delta, delta)
            self._known[name] = Known(square, before + 2 * _inner(weight, mapped) + after)
        return math.sqrt(after / before) if before else math.nan


def _inner(one: Tensor, other: Tensor) -> float:
    """``<A, B>``, the sum of the products of their entries."""
    return float(torch.linalg.vecdot(one.flatten(), other.flatten()))
