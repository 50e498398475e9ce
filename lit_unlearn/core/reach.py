"""The reach of an edited linear map: how near keys of the retained span come to the outputs that a concept had.

    reach = min ||W k - v|| / ||v||   over k in the span of the retained keys with ||k|| <= r

``v = W k_c`` is the output of the unedited weight W at a key k_c of the concept, and r is the length of the longest
retained key. An edit within the null space of the retained keys does not change ``W k`` for any such k, so no edit of
this kind raises the reach: it is a floor on what stays within an attacker's reach. It is no certificate of safety,
since an attacker may also find keys outside the span, or longer ones. Without the bound it would be zero as soon as the
retained keys fill the space.

The problem is a trust-region least squares (Moré & Sorensen, 1983): in the singular directions of W on the span, the
best key is ``c_i / (s_i^2 + shift)`` with one number ``shift >= 0``, which is zero if that key is short enough, and
otherwise solves the secular equation ``||k(shift)|| = r``. Rows are samples, as in `closed_form`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_unlearn.core.matrices import checked_matrix, checked_moment
from lit_unlearn.core.null_space import NullSpaceBasis
from lit_unlearn.core.seeds import seeded
from lit_unlearn.core.solvers import Write
from lit_unlearn.core.thin import Moment, ThinMoment, thin_spectrum

CUT = 1e-2
"""Without a null space, the retained span is that of the eigenvectors of K0 K0^T with at least this share of its mean
eigenvalue."""
TOLERANCE = 1e-3
"""A key carries the concept if it is given a value that differs from its old output by more than this share."""
MOST_KEYS = 256
"""Number of keys of a map whose reach is computed at most."""
MOST_STEPS = 100
"""Bound on the steps of the secular equation; usually about ten are enough."""


def largest_norm(keys: Tensor) -> float:
    """Length of the longest of ``keys`` (n, d_in); 0 if there are none."""
    keys = checked_matrix("keys", keys, (None, None))
    return float(keys.norm(dim=1).max()) if len(keys) else 0.0


def retained_directions(moment: Moment, cut: float = CUT) -> Tensor:
    """Directions that the retained keys use: eigenvectors of their second moment.

    Args:
        moment: K0 K0^T, (d_in, d_in), or its few keys.
        cut: Smallest eigenvalue of a direction, as a share of the mean eigenvalue.

    Returns:
        Orthonormal columns, (d_in, k), float64.

    Raises:
        ValueError: ``moment`` is not a finite symmetric matrix.
    """
    if isinstance(moment, ThinMoment):
        eigenvectors, eigenvalues = thin_spectrum(moment)
        own = eigenvalues[len(eigenvalues) - eigenvectors.shape[1] :]
        return eigenvectors[:, (own >= cut * eigenvalues.mean()) & (own > 0)].contiguous()
    eigenvalues, eigenvectors = torch.linalg.eigh(checked_moment("moment", moment))
    return eigenvectors[:, (eigenvalues >= cut * eigenvalues.mean()) & (eigenvalues > 0)].contiguous()


def on_retained_span(weight: Tensor, retained: NullSpaceBasis | Tensor) -> Tensor:
    """W on the retained span and zero across it, which edits within the null space do not change.

    Args:
        weight: W, (d_out, d_in).
        retained: The null space, whose complement is the span; or an orthonormal basis of the span, (d_in, k).

    Returns:
        ``W (I - U U^T)`` with the null space's basis U, or ``W Q Q^T`` with the span's basis Q, (d_out, d_in), float64.

    Raises:
        ValueError: Shapes do not match, or values are not finite.
    """
    weight = checked_matrix("weight", weight, (None, None))
    if isinstance(retained, NullSpaceBasis):
        basis = checked_matrix("retained.basis", retained.basis, (weight.shape[1], None), weight.device)
        return weight - (weight @ basis) @ basis.mT
    basis = checked_matrix("retained", retained, (weight.shape[1], None), weight.device)
    return (weight @ basis) @ basis.mT


def reach(on_span: Tensor, outputs: Tensor, longest: float) -> Tensor:
    """Least relative distance from ``outputs`` of what keys up to a length give.

    It costs one eigendecomposition of size min(d_out, d_in) for all outputs. The distance is that of a key of the span
    which is short enough; singular values below about 1e-7 of the largest count as zero.

    Args:
        on_span: W on the span of the keys and zero across it, (d_out, d_in).
        outputs: v, (m, d_out).
        longest: r, largest norm of a key.

    Returns:
        (m,), in [0, 1], float64; 0 for an output that is zero, which the zero key gives.

    Raises:
        ValueError: Shapes do not match, values are not finite, or ``longest`` is not positive.
    """
    matrix = checked_matrix("on_span", on_span, (None, None))
    d_out, d_in = matrix.shape
    outputs = checked_matrix("outputs", outputs, (None, d_out), matrix.device)
    if not 0 < longest < float("inf"):
        raise ValueError(f"longest={longest} must be a positive number: the length of the longest retained key.")
    energies, vectors = torch.linalg.eigh(matrix.mT @ matrix if d_in <= d_out else matrix @ matrix.mT)
    some = energies > len(energies) * torch.finfo(energies.dtype).eps * energies[-1]
    energies, vectors = energies[some], vectors[:, some]
    directions = vectors if d_in <= d_out else matrix.mT @ vectors / energies.sqrt()  # right singular, (d_in, k)
    images = matrix @ directions  # (d_out, k)
    slopes = outputs @ images  # (m, k)
    keys = slopes / (energies + _secular_shift(slopes, energies, longest))
    keys = keys * (longest / keys.norm(dim=1, keepdim=True)).clamp_max(1)
    sizes = outputs.norm(dim=1)
    distances = (outputs - keys @ images.mT).norm(dim=1)
    return torch.where(sizes > 0, (distances / sizes).clamp_max(1), 0)


def _secular_shift(slopes: Tensor, energies: Tensor, longest: float) -> Tensor:
    """The smallest shift >= 0 for which ``slopes / (energies + shift)`` (m, k) is at most ``longest``, (m, 1).

    Newton's method on ``1 / ||k(shift)|| = 1 / longest``, whose left side is concave: from the left it never passes the
    solution. Where rounding makes it pass, the interval is halved.

    Args:
        slopes: c, (m, k).
        energies: s^2, positive and ascending, (k,).
        longest: r.
    """
    high = slopes.norm(dim=1, keepdim=True) / longest
    low = (high - energies[-1:]).clamp_min(0) if len(energies) else high
    shift, squares = low, slopes.square()
    for _ in range(MOST_STEPS):
        inverse = 1 / (energies + shift)
        lengths = (squares * inverse.square()).sum(1, keepdim=True).sqrt()
        too_long = lengths > longest
        if bool(((lengths / longest - 1).abs() <= 1e-12).logical_or((shift == 0) & ~too_long).all()):
            break
        low, high = torch.where(too_long, shift, low), torch.where(too_long, high, shift)
        slope = (squares * inverse.pow(3)).sum(1, keepdim=True)
        newton = shift + lengths.square() / slope * (lengths / longest - 1)
        shift = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return shift


def reach_report(write: Write, weight: Tensor, retained: NullSpaceBasis | Tensor) -> dict[str, float]:
    """The reach of one linear map, over the keys that carry the concept.

    These are the keys of ``write`` in ``concept_keys`` whose values differ from their old outputs by more than
    ``TOLERANCE``. If there are more than ``MOST_KEYS`` in ``concept_keys``, as many are drawn, with a fixed seed and
    not at even distances, which could meet the same position of every prompt.

    Args:
        write: What is written first into this map.
        weight: W before any edit, (d_out, d_in).
        retained: As in `on_retained_span`.

    Returns:
        ``reach``, the median over these keys, and ``least_reach``, the least; empty if it is not known how long the
        retained keys are, or if no key carries the concept.
    """
    longest = write.retained.largest_norm
    if not longest:
        return {}
    rows = torch.arange(len(write.keys))
    if write.concept_keys is not None:
        rows = rows[write.concept_keys.cpu()]
    if len(rows) > MOST_KEYS:
        rows = rows[torch.randperm(len(rows), generator=seeded("reach"))[:MOST_KEYS].sort().values]
    weight = checked_matrix("weight", weight, (None, None))
    rows = rows.to(write.keys.device)
    outputs = checked_matrix("keys", write.keys[rows], (None, weight.shape[1]), weight.device) @ weight.mT
    values = checked_matrix("values", write.wanted(rows), (None, len(weight)), weight.device)
    outputs = outputs[(values - outputs).norm(dim=1) > TOLERANCE * outputs.norm(dim=1)]
    if not len(outputs):
        return {}
    if isinstance(retained, NullSpaceBasis):
        on_span = on_retained_span(weight, retained)
    else:  # in coordinates of the span, where lengths are the same and few directions make a small problem
        on_span = weight @ checked_matrix("retained", retained, (weight.shape[1], None), weight.device)
    found = reach(on_span, outputs, longest)
    return {"reach": float(found.quantile(0.5)), "least_reach": float(found.min())}
