"""Unified Concept Editing (Gandikota et al., 2024) of all cross-attention matrices in one solve, and its targets.

The keys of ``attn2.to_k`` and ``attn2.to_v`` are text states c, the same for all of these matrices. So the system of
the closed form, (d_in, d_in), is the same too: it is factorised once, with the outputs of all matrices on its right.

    W' = (lamb W + s_e sum v* c^T + s_p sum W c_p c_p^T) (lamb I + s_e sum c c^T + s_p sum c_p c_p^T)^-1

Rows are samples, as in `closed_form`. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import least_squares_condition, least_squares_update
from lit_unlearn.core.matrices import check_nonnegative, checked_matrix, checked_moment


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
    if not (math.isfinite(erase_scale) and erase_scale > 0):
        raise ValueError(f"erase_scale={erase_scale} must be a positive number; to erase less, raise lamb.")
    check_nonnegative("preserve_scale", preserve_scale)
    check_nonnegative("lamb", lamb)
    stacked, values = _stacked(weights, keys, targets)
    if preserved_moment is None:
        preserved_moment = stacked.new_zeros(stacked.shape[1], stacked.shape[1])
    delta = least_squares_update(
        stacked, keys, values, preserved_moment, lamb / erase_scale, preserve_scale / erase_scale
    )
    return list(delta.split([len(weight) for weight in weights]))


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
    if preserved_moment is not None:
        moment = checked_moment("preserved_moment", preserved_moment, weight.shape[1], weight.device)
        energy = [((matrix @ moment) * matrix).sum().clamp(min=0.0) for matrix in (delta, weight)]
        report["leak"] = (energy[0] / energy[1]).sqrt()
    return {name: float(value) for name, value in report.items()}


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
