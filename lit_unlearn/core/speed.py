"""Closed form of SPEED (Li et al., ICLR 2026): null-space edit of a cross-attention matrix with a refined retain set.

The paper writes keys as columns. Here rows are samples (see `closed_form`):

    paper                                       here
    W          (d_out, d_in)                    weight
    C1         mean of c c^T, edited texts      keys.mT @ keys / num_texts; the products of a text's keys c are added
                                                up if it has several
    C*         mean of c* c^T, c* the anchor    anchor_keys.mT @ keys / num_texts, row by row with keys
    C0         mean of c c^T, retained keys     what `retained_null_space` takes, after filter and augmentation
    P          P = U U^T, eigenvalues below     NullSpaceBasis
    K2         (d_in, m), invariants            invariants.mT
    Delta      W' = W + Delta                   what `speed_update` returns

`speed_update` is the minimum over ``Delta = Delta P`` with ``Delta K2 = 0`` of

    sum_i ||(W + Delta) c_i - W c*_i||^2 / num_texts  +  retain_scale ||Delta||^2,

and with ``lamb > 0`` the constraint becomes the penalty ``||Delta K2||^2 / lamb``. Everything is in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_unlearn.core.matrices import check_nonnegative, checked_matrix, cholesky_factor, solve_positive_definite
from lit_unlearn.core.null_space import NullSpaceBasis, NullSpaceRule, null_space, null_space_from_keys

STARTS = 10
"""Starts of k-means."""


def erasing_update(weight: Tensor, keys: Tensor, anchor_keys: Tensor, num_texts: int | None = None) -> Tensor:
    """Change of the weight that would erase without retaining anything: ``W (C* - C1) (I + C1)^-1``.

    Args:
        weight: W, (d_out, d_in).
        keys: c, (n, d_in).
        anchor_keys: c*, the row whose output each of ``keys`` should have, (n, d_in).
        num_texts: Number of texts that the keys come from; None: one key per text.

    Returns:
        (d_out, d_in), float64.

    Raises:
        ValueError: Shapes do not match, or values are not finite.
    """
    weight, keys, anchor_keys = _checked(weight, keys, anchor_keys, num_texts)
    system = keys.mT @ keys
    system.diagonal().add_(1.0)
    return solve_positive_definite(system, _erasing_direction(weight, keys, anchor_keys), 1.0)


def most_influenced(keys: Tensor, update: Tensor) -> Tensor:
    """Select the keys that ``update`` moves more than the average (Influence-based Prior Filtering).

    Args:
        keys: c, one row per retained key, (n, d_in).
        update: Change of the weight, such as from `erasing_update`, (d_out, d_in).

    Returns:
        Mask (n,), true where ``||update c||`` is above its mean over ``keys``. If no key is above it (there is one key,
        or all are moved equally), all keys are selected, since a retain set must not become empty.
    """
    update = checked_matrix("update", update, (None, None))
    shift = (checked_matrix("keys", keys, (None, update.shape[1]), update.device) @ update.mT).norm(dim=1)
    above = shift > shift.mean()
    return above if bool(above.any()) else torch.ones_like(above)


def augmented(keys: Tensor, weight: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Copy ``keys`` with noise that hardly changes the layer's output (Directed Prior Augmentation, before its filter).

    A copy is ``c + P_min e`` with ``e ~ N(0, I)`` and ``P_min = v v^T``, where v is the right singular vector of the
    smallest of W's min(d_out, d_in) singular values (as in the reference code; the paper allows more of them). The size
    of the change of ``W c`` is this singular value times ``v^T e``. Only ``v^T e``, which is standard normal, is drawn.

    Args:
        keys: c, one row per retained key, (n, d_in).
        weight: W, (d_out, d_in).
        copies: Number of copies of each key; 0 for none.
        generator: Source of the noise, on the CPU.

    Returns:
        (copies * n, d_in), float64; the copies of one key are not adjacent rows.
    """
    weight = checked_matrix("weight", weight, (None, None))
    keys = checked_matrix("keys", keys, (None, weight.shape[1]), weight.device)
    _, _, directions = torch.linalg.svd(weight, full_matrices=False)
    direction = directions[-1:]  # (1, d_in), v^T
    noise = torch.randn(copies * len(keys), 1, dtype=torch.float64, generator=generator).to(keys.device)
    return keys.repeat(copies, 1) + noise * direction


def retained_null_space(keys: Tensor, threshold: float, rule: NullSpaceRule, minimum: int = 0) -> NullSpaceBasis:
    """Null space P of the refined retain set, from its keys (n, d_in); thresholds as in `null_space`."""
    keys = checked_matrix("keys", keys, (None, None))
    if len(keys) <= keys.shape[1]:
        return null_space_from_keys(keys, threshold, rule, minimum=minimum)
    return null_space(keys.mT @ keys, threshold, rule, len(keys), minimum)  # size does not grow with n


def k_means(
    points: Tensor, num_centres: int, generator: torch.Generator, max_rounds: int = 100, starts: int = STARTS
) -> Tensor:
    """Centres of ``points`` by Lloyd's algorithm from k-means++ starts: the result with the least inertia.

    A single start often ends in a poor minimum. The reference code has one start as well, from rows drawn evenly, which
    ends in the best minimum more often; with ten starts the seed hardly matters.

    Args:
        points: (n, d).
        num_centres: Number of centres; fewer are returned if there are fewer distinct points.
        generator: Source of the random starts, on the CPU.
        max_rounds: Stop after this many rounds, or earlier if no point changes its centre.
        starts: Number of starts.

    Returns:
        (k, d), float64, k <= num_centres: each is the mean of the points nearest to it.

    Raises:
        ValueError: ``num_centres`` is larger than the number of points, or less than 1.
    """
    points = checked_matrix("points", points, (None, None))
    if not 1 <= num_centres <= len(points):
        raise ValueError(f"num_centres={num_centres} must lie in [1, {len(points)}], the number of points.")
    best, least = _lloyd(points, num_centres, generator, max_rounds)
    for _ in range(starts - 1):
        centres, inertia = _lloyd(points, num_centres, generator, max_rounds)
        if inertia < (1 - 1e-9) * least:  # by more than rounding, so that equal minima keep their order
            best, least = centres, inertia
    return best


def _lloyd(points: Tensor, num_centres: int, generator: torch.Generator, max_rounds: int) -> tuple[Tensor, float]:
    """Centres (k, d) from one start, and their inertia: the sum of squared distances of the points from the nearest."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < num_centres:
        distances = _squared_distances(points, centres).min(dim=1).values.cpu()
        if not bool(distances.max() > 1e-12 * points.square().sum(1).max()):  # only copies left
            break
        chosen = torch.multinomial(distances, 1, generator=generator)
        centres = torch.cat([centres, points[chosen.to(points.device)]])
    nearest = _squared_distances(points, centres).argmin(dim=1)
    for _ in range(max_rounds):
        # A centre without points stays where it is.
        centres = torch.stack(
            [points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(len(centres))]
        )
        previous, nearest = nearest, _squared_distances(points, centres).argmin(dim=1)
        if torch.equal(previous, nearest):
            break
    return centres, float(_squared_distances(points, centres).min(dim=1).values.sum())


def speed_update(
    weight: Tensor,
    keys: Tensor,
    anchor_keys: Tensor,
    free: NullSpaceBasis,
    invariants: Tensor | None = None,
    retain_scale: float = 1.0,
    lamb: float = 0.0,
    num_texts: int | None = None,
) -> Tensor:
    """Weight change that gives ``keys`` the outputs of ``anchor_keys`` and leaves retained keys and invariants alone.

    ``Delta = W (C* - C1) P [I - M K2 (K2^T P M K2 + lamb I)^-1 K2^T P] M`` with ``M = (C1 P + retain_scale I)^-1``. It
    is solved in the basis U, where ``U^T (C1 P + retain_scale I)^-1 U`` is the inverse of the symmetric
    ``A = U^T C1 U + retain_scale I = L L^T``. The bracket removes the range of ``L^-1 U^T K2`` from the rows of
    ``W (C* - C1) U L^-T``. So the system can be solved without lamb, even if invariants depend on each other or P has
    already removed them.

    Args:
        weight: W, (d_out, d_in).
        keys: c, (n, d_in).
        anchor_keys: c*, (n, d_in).
        free: Null space of the retained keys, P.
        invariants: K2 transposed, one row per key whose output must stay, (m, d_in); None for none.
        retain_scale: Weight of the size of the edit, positive.
        lamb: 0 makes ``Delta K2`` zero; with a larger value its square is a penalty of weight ``1 / lamb``.
        num_texts: Number of texts that ``keys`` come from; None: one key per text.

    Returns:
        Delta, (d_out, d_in), float64.

    Raises:
        ValueError: Shapes do not match, values are not finite, or ``retain_scale`` is not positive or is too small to
            solve with.
    """
    if not (math.isfinite(retain_scale) and retain_scale > 0):
        raise ValueError(f"retain_scale={retain_scale} must be a positive number.")
    check_nonnegative("lamb", lamb)
    weight, keys, anchor_keys = _checked(weight, keys, anchor_keys, num_texts)
    basis = checked_matrix("free.basis", free.basis, (weight.shape[1], None), weight.device)
    reduced = keys @ basis  # (n, k)
    system = reduced.mT @ reduced
    system.diagonal().add_(retain_scale)
    lower = cholesky_factor(system, "retain_scale", retain_scale)
    # W (C* - C1) U L^-T, (d_out, k): in these coordinates the quadratic form of the problem is the identity.
    direction = _erasing_direction(weight, keys, anchor_keys) @ basis
    whitened = torch.linalg.solve_triangular(lower.mT, direction, upper=True, left=False)
    if invariants is not None and len(invariants):
        invariants = checked_matrix("invariants", invariants, (None, weight.shape[1]), weight.device)
        fixed = torch.linalg.solve_triangular(lower, basis.mT @ invariants.mT, upper=False)  # (k, m), L^-1 U^T K2
        left, singular_values, _ = torch.linalg.svd(fixed, full_matrices=False)
        # The eigenvalues of A are at least retain_scale, so this is a relative tolerance on U^T K2.
        seen = singular_values > 1e-12 * float(invariants.norm()) / math.sqrt(retain_scale)
        left, energies = left[:, seen], singular_values[seen].square()
        whitened = whitened - (whitened @ left) * (energies / (energies + lamb)) @ left.mT
    return torch.linalg.solve_triangular(lower, whitened, upper=False, left=False) @ basis.mT


def speed_condition(
    keys: Tensor, free: NullSpaceBasis, retain_scale: float = 1.0, num_texts: int | None = None
) -> float:
    """Condition number of the system of `speed_update`, ``U^T C1 U + retain_scale I``; it takes the same arguments.

    The other system of `speed_update`, over the invariants, is solved by its singular values, so rounding is not a
    problem there.
    """
    keys = checked_matrix("keys", keys, (None, len(free.basis)), free.basis.device)
    singular_values = torch.linalg.svdvals(keys @ free.basis) / math.sqrt(len(keys) if num_texts is None else num_texts)
    smallest = float(singular_values[-1]) if len(keys) >= free.dimension else 0.0  # fewer keys do not span all
    return (float(singular_values[0]) ** 2 + retain_scale) / (smallest**2 + retain_scale)


def relative_output(matrix: Tensor, weight: Tensor, keys: Tensor) -> float:
    """``||matrix K|| / ||W K||``, Frobenius norms: relative size of the outputs of ``matrix`` at ``keys`` (n, d_in)."""
    keys = keys.to(weight)
    return float((keys @ matrix.mT).norm() / (keys @ weight.mT).norm())


def _checked(weight: Tensor, keys: Tensor, anchor_keys: Tensor, num_texts: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, keys and anchors in float64; keys and anchors are scaled so that their products sum to C1 and C*."""
    weight = checked_matrix("weight", weight, (None, None))
    keys = checked_matrix("keys", keys, (None, weight.shape[1]), weight.device)
    if len(keys) == 0:
        raise ValueError("keys is empty: an edit needs at least one text.")
    scale = math.sqrt(len(keys) if num_texts is None else num_texts)
    anchor_keys = checked_matrix("anchor_keys", anchor_keys, tuple(keys.shape), weight.device)
    return weight, keys / scale, anchor_keys / scale


def _erasing_direction(weight: Tensor, keys: Tensor, anchor_keys: Tensor) -> Tensor:
    """``W (C* - C1)``, (d_out, d_in)."""
    return ((anchor_keys - keys) @ weight.mT).mT @ keys


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (n, k), from differences: with the expanded square, equal points would not have distance 0."""
    return (points.unsqueeze(1) - centres.unsqueeze(0)).square().sum(-1)
