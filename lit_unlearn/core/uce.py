"""Unified Concept Editing (Gandikota et al., 2024) of all cross-attention matrices in one solve, and its targets.

The keys of ``attn2.to_k`` and ``attn2.to_v`` are text states c, the same for all of these matrices. So the system of
the closed form, (d_in, d_in), is the same too: it is factorised once, with the outputs of all matrices on its right.

    W' = (lamb W + s_e sum v* c^T + s_p sum W c_p c_p^T) (lamb I + s_e sum c c^T + s_p sum c_p c_p^T)^-1

If every target is the matrix's own output of another state, ``v* = W c*``, then even the change is the same map for all
matrices (`SharedMap`):

    W' - W = W B,   B = sum (c* - c) c^T  (lamb / s_e I + sum c c^T + s_p / s_e sum c_p c_p^T)^-1

so nothing of the size of a matrix is on the right of the solve, and B has at most as many dimensions as there are
edited states: the edit is a low-rank change (LoRA) of that rank, without an approximation.

Rows are samples, as in `closed_form`. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import LeastSquaresSystem, least_squares_condition, least_squares_update
from lit_unlearn.core.matrices import check_nonnegative, checked_matrix, checked_moment
from lit_unlearn.core.retained_outputs import leak


def map_updates(
    weights: Sequence[Tensor],
    keys: Tensor,
    targets: Sequence[Tensor],
    preserved_moment: Tensor | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
) -> list[Tensor]:
    """Changes ``W' - W`` of many matrices with the same keys, as `closed_form.ridge_map_update` of each, in one solve.

    ``keys`` may contain the keys of any number of concepts.

    Args:
        weights: W of each matrix, (d_out, d_in); d_out may differ.
        keys: Text states c of the edited concepts, (n, d_in).
        targets: Outputs v* that each matrix should have for them, (n, d_out).
        preserved_moment: Sum of c_p c_p^T over the text states whose outputs should stay, (d_in, d_in); None for none.
        erase_scale: s_e, positive.
        preserve_scale: s_p.
        lamb: Pull towards the present weights; the larger it is, the less they change.

    Returns:
        Changes (d_out, d_in), float64, in the order of ``weights``.

    Raises:
        ValueError: As in `closed_form.ridge_map_update`, or there are not as many targets as weights.
    """
    _check_scales(erase_scale, preserve_scale, lamb)
    stacked, values = _stacked(weights, keys, targets)
    if preserved_moment is None:
        preserved_moment = stacked.new_zeros(stacked.shape[1], stacked.shape[1])
    delta = least_squares_update(
        stacked, keys, values, preserved_moment, lamb / erase_scale, preserve_scale / erase_scale
    )
    return list(delta.split([len(weight) for weight in weights]))


@dataclass(frozen=True)
class SharedMap:
    """B of ``W' - W = W B``, the same for all matrices that read the same states; from `shared_map`.

    Attributes:
        left: (d_in, r).
        right: (r, d_in); B = left @ right. With few states r is their number, otherwise r = d_in and ``right`` is None.
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """B, (d_in, d_in), float64."""
        return self.left if self.right is None else self.left @ self.right

    def change(self, weight: Tensor) -> Tensor:
        """``W' - W = W B`` of a matrix W (d_out, d_in), float64.

        Raises:
            ValueError: The matrix has another number of inputs, or is not finite.
        """
        weight = checked_matrix("weight", weight, (None, len(self.left)), self.left.device)
        moved = weight @ self.left
        return moved if self.right is None else moved @ self.right


def shared_map(
    keys: Tensor,
    guides: Tensor,
    preserved_moment: Tensor | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
) -> SharedMap:
    """B of all matrices whose targets are their own outputs of other states; as `map_updates` with ``v* = W c*``.

    Args:
        keys: Text states c of the edited concepts, (n, d_in).
        guides: States c* whose outputs they get, row by row, (n, d_in).
        preserved_moment: As in `map_updates`, as the next three.
        erase_scale: s_e, positive.
        preserve_scale: s_p.
        lamb: Pull towards the present weights.

    Raises:
        ValueError: As in `map_updates`.
    """
    _check_scales(erase_scale, preserve_scale, lamb)
    keys = checked_matrix("keys", keys, (None, None))
    if len(keys) == 0:
        raise ValueError("keys is empty: an edit needs at least one token.")
    guides = checked_matrix("guides", guides, tuple(keys.shape), keys.device)
    moment = keys.new_zeros(keys.shape[1], keys.shape[1]) if preserved_moment is None else preserved_moment
    ridge = lamb / erase_scale
    system = LeastSquaresSystem(keys.mT @ keys, moment, ridge, preserve_scale / erase_scale)
    if 2 * len(keys) < keys.shape[1]:  # two thin products with each matrix cost less than a square one
        return SharedMap((guides - keys).mT, system.solve(keys))
    return SharedMap(system.solve((guides - keys).mT @ keys))


class SharedReport:
    """`map_report` of many matrices with the same states and targets ``v* = W c*``.

    With few states it uses their outputs. With many it needs three products of d_in x d_in with each matrix, whatever
    the number of states; ``residual`` is then exact to about 1e-8 of ``residual_before``.

    Args:
        keys: c, (n, d_in).
        guides: c*, (n, d_in).
        preserved_moment: As in `map_updates`.
        preserved_keys: The preserved states themselves, (m, d_in), which are used if they are few.

    Raises:
        ValueError: Shapes do not match, or values are not finite.
    """

    def __init__(
        self,
        keys: Tensor,
        guides: Tensor,
        preserved_moment: Tensor | None = None,
        preserved_keys: Tensor | None = None,
    ) -> None:
        self.keys = checked_matrix("keys", keys, (None, None))
        d_in = self.keys.shape[1]
        self.guides = checked_matrix("guides", guides, tuple(self.keys.shape), self.keys.device)
        self.moment = self.kept = None
        if preserved_moment is not None:
            self.moment = checked_moment("preserved_moment", preserved_moment, d_in, self.keys.device)
            if preserved_keys is not None and len(preserved_keys) < d_in:
                self.kept = checked_matrix("preserved_keys", preserved_keys, (None, d_in), self.keys.device)
        of_kept = 0 if self.moment is None else 2 * (d_in if self.kept is None else len(self.kept))
        self.direct = 3 * len(self.keys) + of_kept <= 3 * d_in

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the states of ``(c - c*) (c - c*)^T``, ``c (c - c*)^T``, ``c c^T`` and ``c* c*^T``."""
        apart = self.keys - self.guides
        return apart.mT @ apart, self.keys.mT @ apart, self.keys.mT @ self.keys, self.guides.mT @ self.guides

    def of(self, weight: Tensor, delta: Tensor) -> dict[str, float]:
        """The entries of `map_report` for a matrix ``weight`` and its change ``delta``, (d_out, d_in) each.

        Raises:
            ValueError: Shapes do not match, or values are not finite.
        """
        weight = checked_matrix("weight", weight, (None, self.keys.shape[1]), self.keys.device)
        delta = checked_matrix("delta", delta, tuple(weight.shape), self.keys.device)
        if self.direct:
            goal = (self.guides @ weight.mT).norm()
            apart = (self.keys - self.guides) @ weight.mT
            before, after = apart.norm(), (apart + self.keys @ delta.mT).norm()
            inner = None
        else:
            inner = weight.mT @ weight, delta.mT @ weight, delta.mT @ delta
            apart, mixed, own, theirs = self.moments
            goal, before = _energy(inner[0], theirs).sqrt(), _energy(inner[0], apart).sqrt()
            total = (inner[0] * apart).sum() + 2 * (inner[1] * mixed).sum() + (inner[2] * own).sum()
            after = total.clamp(min=0.0).sqrt()
        report = {
            "relative_norm": delta.norm() / weight.norm(),
            "residual_before": before / goal,
            "residual": after / goal,
        }
        if self.kept is not None:
            report["leak"] = (self.kept @ delta.mT).norm() / (self.kept @ weight.mT).norm()
        elif self.moment is not None:
            squares = (delta.mT @ delta, weight.mT @ weight) if inner is None else (inner[2], inner[0])
            report["leak"] = (_energy(squares[0], self.moment) / _energy(squares[1], self.moment)).sqrt()
        return {name: float(value) for name, value in report.items()}


def map_condition(
    keys: Tensor,
    preserved_moment: Tensor | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
) -> float:
    """Condition number of the system that all matrices share in `map_updates`; it takes the same arguments."""
    if preserved_moment is None:
        preserved_moment = keys.new_zeros(keys.shape[1], keys.shape[1])
    return least_squares_condition(keys, preserved_moment, lamb / erase_scale, preserve_scale / erase_scale)


def map_report(
    weight: Tensor, delta: Tensor, keys: Tensor, targets: Tensor, preserved_moment: Tensor | None = None
) -> dict[str, float]:
    """Measure how well a change of `map_updates` edits and preserves.

    Args:
        weight: W before the edit, (d_out, d_in).
        delta: W' - W, (d_out, d_in).
        keys: Text states c, (n, d_in).
        targets: v*, (n, d_out).
        preserved_moment: As in `map_updates`.

    Returns:
        ``relative_norm``, ||W' - W|| / ||W||; ``residual_before``, ||W c - v*|| / ||v*||, and ``residual`` with W'; and
        with preserved keys ``leak``, ||(W' - W) c_p|| / ||W c_p||. Norms are Frobenius norms over all keys.
    """
    weight = checked_matrix("weight", weight, (None, None))
    delta = checked_matrix("delta", delta, tuple(weight.shape), weight.device)
    keys = checked_matrix("keys", keys, (None, weight.shape[1]), weight.device)
    targets = checked_matrix("targets", targets, (len(keys), len(weight)), weight.device)
    before = keys @ weight.mT - targets
    report = {
        "relative_norm": delta.norm() / weight.norm(),
        "residual_before": before.norm() / targets.norm(),
        "residual": (before + keys @ delta.mT).norm() / targets.norm(),
    }
    numbers = {name: float(value) for name, value in report.items()}
    if preserved_moment is not None:
        moment = checked_moment("preserved_moment", preserved_moment, weight.shape[1], weight.device)
        numbers["leak"] = leak(delta, weight, moment)
    return numbers


def without_component(targets: Tensor, outputs: Tensor, phrases: Tensor) -> Tensor:
    """Remove from ``targets`` their component along ``outputs``: the technique ``tensor`` of UCE's code of 2023.

    As in that code, all token positions of a phrase together are treated as one long vector.

    Args:
        targets: Outputs of the guide, (n, d_out).
        outputs: Present outputs of the phrase, (n, d_out).
        phrases: Number of the phrase of each row, (n,).

    Returns:
        (n, d_out); its inner product with ``outputs`` over the rows of any phrase is zero.
    """
    overlap = _sum_by_phrase((targets * outputs).sum(-1), phrases)
    energy = _sum_by_phrase(outputs.square().sum(-1), phrases)
    return targets - (overlap / energy)[phrases].unsqueeze(-1) * outputs


def shifted_by_attributes(
    outputs: Tensor, attributes: Tensor, alphas: Tensor, phrases: Tensor, normalised: bool = True
) -> Tensor:
    """Targets of debiasing: the phrase's own outputs plus weighted outputs of the attributes.

    The formula is ``v* = v + sum_a alpha_a v_a``.

    Args:
        outputs: Present outputs v of the phrases, (n, d_out).
        attributes: Outputs of the attributes' phrases at the same positions, (A, n, d_out).
        alphas: Weight of each attribute for each phrase, (number of phrases, A).
        phrases: Number of the phrase of each row, (n,).
        normalised: Scale the attributes' outputs to the norm of the phrase's outputs, over all positions of the phrase,
            as in UCE's code of 2023; the paper and the code of 2025 do not scale them.

    Returns:
        v*, (n, d_out).
    """
    weights = alphas.to(outputs).mT[:, phrases]  # (A, n)
    if normalised:
        own = _sum_by_phrase(outputs.square().sum(-1), phrases)
        theirs = torch.stack([_sum_by_phrase(v.square().sum(-1), phrases) for v in attributes])
        weights = weights * (own / theirs).sqrt()[:, phrases]
    return outputs + (weights.unsqueeze(-1) * attributes).sum(0)


def _stacked(weights: Sequence[Tensor], keys: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All matrices as one, (sum of d_out, d_in), and all targets as one, (n, sum of d_out)."""
    if len(weights) != len(targets) or not weights:
        raise ValueError(f"There are {len(targets)} targets for {len(weights)} weights: give one target per weight.")
    pairs = list(zip(weights, targets, strict=True))
    columns = [checked_matrix("targets", value, (len(keys), len(weight)), weight.device) for weight, value in pairs]
    return torch.cat([checked_matrix("weight", w, (None, keys.shape[1])) for w in weights]), torch.cat(columns, dim=1)


def _sum_by_phrase(values: Tensor, phrases: Tensor) -> Tensor:
    """Sums (number of phrases,) of ``values`` (n,) over the rows of each phrase."""
    return values.new_zeros(int(phrases.max()) + 1).index_add(0, phrases, values)


def _energy(inner: Tensor, moment: Tensor) -> Tensor:
    """``||A K||^2`` from ``A^T A`` and the moment ``K K^T``."""
    return (inner * moment).sum().clamp(min=0.0)


def _check_scales(erase_scale: float, preserve_scale: float, lamb: float) -> None:
    """Raise ValueError unless ``erase_scale`` is positive and the other two are not negative."""
    if not (math.isfinite(erase_scale) and erase_scale > 0):
        raise ValueError(f"erase_scale={erase_scale} must be a positive number; to erase less, raise lamb.")
    check_nonnegative("preserve_scale", preserve_scale)
    check_nonnegative("lamb", lamb)
