"""The null space of the retained keys: the input directions an edit may use (paper Sec. 4).

A cut divides the directions into free and retained ones. ``soft_null_space`` has no cut: every direction is free to the
extent that retained keys do not use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_unlearn.core.matrices import checked_matrix, checked_moment

NullSpaceRule = Literal["max", "mean", "absolute", "energy", "count"]


class EmptyNullSpaceError(ValueError):
    """With the chosen rule and threshold, the null space of the retained keys is empty."""


@dataclass(frozen=True, eq=False)
class NullSpaceBasis:
    """The input directions that retained keys (almost) do not use."""

    basis: Tensor
    """U, orthonormal columns, (d_in, k), float64; of a soft null space the columns are shorter than 1."""
    eigenvalues: Tensor
    """All eigenvalues of K0 K0^T, (d_in,), ascending, float64. The first k belong to ``basis``."""
    cutoff: float
    """Directions whose eigenvalue is below this are in the null space; in units of ``eigenvalues``. In a soft null
    space, directions with this eigenvalue are half free."""
    is_soft: bool = False
    """Whether it was made by ``soft_null_space``."""

    @property
    def dimension(self) -> int:
        """Number of free directions k; those of a soft null space are counted if they are at least half free."""
        return int((self.eigenvalues < self.cutoff).sum()) if self.is_soft else self.basis.shape[1]

    @cached_property
    def free(self) -> Tensor:
        """Share of each direction of the basis that is free, (k,): 1 with a cut."""
        return self.basis.square().sum(0)

    @property
    def own(self) -> Tensor:
        """Eigenvalues of the directions of the basis, (k,)."""
        return self.eigenvalues[: self.basis.shape[1]]

    @property
    def projection(self) -> Tensor:
        """P = U U^T, (d_in, d_in), float64."""
        return self.basis @ self.basis.mT

    def cut(self) -> NullSpaceBasis:
        """With a cut: of a soft null space, the directions that are at least half free, entirely."""
        if not self.is_soft:
            return self
        free = self.basis[:, : self.dimension]
        return NullSpaceBasis(free / free.norm(dim=0), self.eigenvalues, self.cutoff)

    def narrowed(self, cutoff: float) -> NullSpaceBasis:
        """The null space of the same keys for a smaller ``cutoff``."""
        if not self.is_soft:
            inside = int((self.eigenvalues[: self.dimension] < cutoff).sum())
            return NullSpaceBasis(self.basis[:, :inside], self.eigenvalues, cutoff)
        free = cutoff / (self.eigenvalues + cutoff)
        before = self.cutoff / (self.eigenvalues + self.cutoff)
        return NullSpaceBasis(self.basis * (free / before).sqrt(), self.eigenvalues, cutoff, is_soft=True)

    def narrower_cutoffs(self) -> list[float]:
        """Cutoffs up to that of this null space, ascending, to search the widest null space with some property."""
        if self.is_soft:
            return [self.cutoff * 10 ** (step / 16 - 4) for step in range(65)]
        return [float(value) for value in self.eigenvalues[1 : self.dimension]] + [self.cutoff]


def null_space(
    moment: Tensor, threshold: float, rule: NullSpaceRule, num_keys: int | None = None, minimum: int = 0
) -> NullSpaceBasis:
    """Null space of the retained keys from their second moment (paper Sec. 4: U with U^T K0 = 0, P = U U^T).

    A moment squares the keys, so singular values of K0 below about 1e-8 of the largest cannot be distinguished from
    zero. If that matters and the keys fit in memory, use `null_space_from_keys`.

    Args:
        moment: K0 K0^T as a sum over keys, (d_in, d_in).
        threshold: Its meaning depends on ``rule``.
        rule: Which eigenvalues of ``moment`` count as zero.
            ``max``: below ``threshold`` times the largest one, threshold in (0, 1].
            ``mean``: below ``threshold`` times their mean (the authors' code: 1/90000 with ``minimum=100``).
            ``absolute``: below ``threshold`` once the moment is divided by ``num_keys`` (AlphaEdit: 2e-2, SPEED: 1e-1).
            ``energy``: all except the fewest leading ones whose sum reaches the fraction ``threshold`` of the trace,
            threshold in (0, 1).
            ``count``: the ``threshold`` smallest ones, an integer in [1, d_in - 1] (ACE: 300 to 400).
        num_keys: Number of keys in ``moment``; needed by ``absolute`` only.
        minimum: If the rule finds fewer directions, take this many of the smallest eigenvalues instead.

    Raises:
        EmptyNullSpaceError: No eigenvalue passes; the message shows the spectrum.
        ValueError: Unknown rule, threshold out of range, or ``moment`` is not finite, symmetric and positive.
    """
    return _select(*_spectrum(moment), threshold, rule, num_keys, minimum)


def soft_null_space(moment: Tensor, threshold: float) -> NullSpaceBasis:
    """The soft null space: ``P = c (K0 K0^T + c I)^-1`` with ``c = threshold`` times the mean eigenvalue.

    A direction of eigenvalue e is free to the share ``c / (e + c)``: unused directions entirely, directions of the
    eigenvalue c by half. P is symmetric with eigenvalues in (0, 1], and the closed form with it stays exact:
    ``Delta = R K1^T P (K1 K1^T P + c I)^-1 = R K1^T (K1 K1^T + K0 K0^T + c I)^-1``, which minimises
    ``||(W + D) K1 - V1||^2 + ||D K0||^2 + c ||D||^2`` (by ``P^-1 = K0 K0^T / c + I``).

    Args:
        moment: K0 K0^T as a sum over keys, (d_in, d_in).
        threshold: c in units of the mean eigenvalue, positive.

    Raises:
        ValueError: The threshold is not positive, or ``moment`` is not finite, symmetric and positive.
    """
    _check_soft(threshold)
    eigenvalues, eigenvectors = _spectrum(moment)
    cutoff = soft_cutoff(eigenvalues, threshold)
    free = cutoff / (eigenvalues + cutoff)
    return NullSpaceBasis(eigenvectors * free.sqrt(), eigenvalues, cutoff, is_soft=True)


def soft_cutoff(eigenvalues: Tensor, threshold: float) -> float:
    """c, ``threshold`` times the mean of the eigenvalues of a moment, (d_in,), ascending.

    Raises:
        ValueError: The threshold is not positive, or all eigenvalues are zero.
    """
    _check_soft(threshold)
    if eigenvalues[-1] <= 0:
        raise ValueError("There are no retained keys, or all are zero: pass at least one retained prompt.")
    return threshold * float(eigenvalues.mean())


def _check_soft(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be positive for rule='soft'.")


def _spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``moment``, ascending and not negative, and its eigenvectors in columns."""
    moment = checked_moment("moment", moment)
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1].abs():
        raise ValueError(
            f"moment has the negative eigenvalue {eigenvalues[0]:.3g} (largest {eigenvalues[-1]:.3g}), so it is not a "
            "sum over keys. When one concept's moment is subtracted from a total, keep both in float64."
        )
    return eigenvalues.clamp(min=0.0), eigenvectors


def null_space_from_keys(
    keys: Tensor, threshold: float, rule: NullSpaceRule, num_keys: int | None = None, minimum: int = 0
) -> NullSpaceBasis:
    """As `null_space`, from the retained keys themselves; faster and more precise if n < d_in.

    Args:
        keys: K0 transposed, one row per retained token, (n, d_in).
        threshold: As in `null_space`, on the squared singular values of ``keys``.
        rule: As in `null_space`.
        num_keys: Defaults to n.
        minimum: As in `null_space`.

    Raises:
        EmptyNullSpaceError: As in `null_space`.
        ValueError: As in `null_space`.
    """
    keys = checked_matrix("keys", keys, (None, None))
    num_rows, d_in = keys.shape
    # The full V is only needed if n < d_in: its last d_in - n rows are the exact null space.
    _, singular_values, directions = torch.linalg.svd(keys, full_matrices=num_rows < d_in)
    eigenvalues = singular_values.new_zeros(d_in)
    eigenvalues[: len(singular_values)] = singular_values.square()
    return _select(eigenvalues.flip(0), directions.flip(0).mT, threshold, rule, num_keys or num_rows, minimum)


def _select(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    threshold: float,
    rule: NullSpaceRule,
    num_keys: int | None,
    minimum: int,
) -> NullSpaceBasis:
    """Choose the null space from an ascending spectrum, (d_in,), and its eigenvectors in columns, (d_in, d_in)."""
    dimension, cutoff = chosen_cut(eigenvalues, threshold, rule, num_keys, minimum)
    return NullSpaceBasis(eigenvectors[:, :dimension].contiguous(), eigenvalues, cutoff)


def chosen_cut(
    eigenvalues: Tensor, threshold: float, rule: NullSpaceRule, num_keys: int | None, minimum: int
) -> tuple[int, float]:
    """Number of free directions and ``NullSpaceBasis.cutoff`` for an ascending spectrum (d_in,); see `null_space`."""
    d_in, largest, mean = len(eigenvalues), float(eigenvalues[-1]), float(eigenvalues.mean())
    if rule not in get_args(NullSpaceRule):
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(get_args(NullSpaceRule))}.")
    if not 0 <= minimum < d_in:
        raise ValueError(f"minimum={minimum} must lie in [0, {d_in - 1}] for a layer with {d_in} inputs.")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold={threshold} must be a finite number.")
    if largest <= 0:
        raise ValueError("There are no retained keys, or all are zero: pass at least one retained prompt.")
    if rule == "count":
        if threshold != int(threshold) or not 1 <= threshold < d_in:
            raise ValueError(f"threshold={threshold} must be an integer in [1, {d_in - 1}] for rule='count'.")
        dimension = int(threshold)
        cutoff = float(eigenvalues[dimension])
    elif rule == "energy":
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} must lie strictly between 0 and 1 for rule='energy'.")
        carried = eigenvalues.flip(0).cumsum(0)
        dimension = d_in - 1 - int((carried < threshold * carried[-1]).sum())
        cutoff = float(eigenvalues[dimension])
    else:
        if threshold <= 0 or (rule == "max" and threshold > 1):
            raise ValueError(f"threshold={threshold} must be positive for rule={rule!r} (and at most 1 for 'max').")
        if rule == "absolute" and (num_keys is None or num_keys < 1):
            raise ValueError("rule='absolute' is a threshold on the mean over keys: pass num_keys.")
        cutoff = threshold * {"max": largest, "mean": mean, "absolute": float(num_keys or 0)}[rule]
        dimension = int((eigenvalues < cutoff).sum())
    if dimension < minimum:
        dimension = minimum
        cutoff = float(eigenvalues[dimension])
    if dimension == 0:
        levels = (0.0, 0.01, 0.1, 0.5, 0.9)
        quantiles = torch.quantile(eigenvalues, eigenvalues.new_tensor(levels)).tolist()
        spectrum = "; ".join(
            f"{100 * level:g}%: {value / largest:.2e} of max, {value / mean:.2e} of mean"
            for level, value in zip(levels, quantiles, strict=True)
        )
        raise EmptyNullSpaceError(
            f"The null space is empty: rule={rule!r} with threshold={threshold:g} needs eigenvalues below "
            f"{cutoff:.3g}, but the smallest of {d_in} is {float(eigenvalues[0]):.3g}. "
            f"Quantiles of the spectrum: {spectrum}. "
            "Raise the threshold (lower it for rule='energy'), set minimum, or retain fewer prompts."
        )
    return dimension, cutoff
