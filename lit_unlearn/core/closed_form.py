"""Closed-form edits of one linear layer: null-space constrained (AlphaEdit), least squares (MEMIT) and UCE.

The papers write keys and values as columns. Here rows are samples, as everywhere in PyTorch:

    paper                                          here
    W          (d_out, d_in)                       weight
    K1         (d_in, n), inputs of W, edited      keys.mT
    V1         (d_out, n), desired outputs         values.mT
    K0 K0^T    (d_in, d_in), inputs to retain      retained_moment = second_moment(keys_retain)
    Kp Kp^T    (d_in, d_in), earlier edits         previous_moment
    U, P       P = U U^T, P K0 = 0                 NullSpaceBasis.basis, NullSpaceBasis.projection
    R          V1 - W K1, (d_out, n)               (values - keys @ weight.mT).mT
    Delta      W' = W + Delta                      what the ``*_update`` functions return

Statistics are computed and systems are solved in float64, on the weight's device or on the CPU (`system.devices`
decides which); updates are returned on the weight's device, in the weight's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_unlearn.core.key_sums import KeySums
from lit_unlearn.core.least_squares_system import LeastSquaresSystem
from lit_unlearn.core.matrices import check_nonnegative, checked_matrix
from lit_unlearn.core.null_space import (
    EmptyNullSpaceError,
    NullSpaceBasis,
    NullSpaceRule,
    null_space,
    null_space_from_keys,
)
from lit_unlearn.core.null_space_system import NullSpaceSystem, RidgeRule, system_of
from lit_unlearn.core.retained_outputs import leak as leak_of
from lit_unlearn.core.thin import Moment, NullSpaceOfKeys, ThinMoment

__all__ = [
    "EmptyNullSpaceError",
    "LeastSquaresSystem",
    "NullSpaceBasis",
    "NullSpaceRule",
    "NullSpaceSystem",
    "RidgeRule",
    "edit_report",
    "least_squares_condition",
    "least_squares_update",
    "null_space",
    "null_space_coefficients",
    "null_space_from_keys",
    "null_space_update",
    "ridge_map_update",
    "second_moment",
]


def second_moment(keys: Tensor) -> Tensor:
    """Compute K K^T in float64. It is additive: the sum over batches or ranks is the moment of all their keys.

    Args:
        keys: One row per token, (n, d_in); n may be 0.

    Returns:
        Unnormalised second moment, (d_in, d_in), float64.
    """
    keys = checked_matrix("keys", keys, (None, None))
    return keys.mT @ keys


def null_space_update(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    projection: NullSpaceOfKeys | Tensor,
    ridge: float = 1.0,
    ridge_rule: RidgeRule = "absolute",
    previous_moment: Tensor | None = None,
    sums: KeySums | None = None,
    system: NullSpaceSystem | None = None,
) -> Tensor:
    """Weight change that maps ``keys`` to ``values`` and keeps the retained keys' outputs (paper Sec. 4; AlphaEdit).

    ``Delta = R K1^T P (K1 K1^T P + ridge I)^-1`` minimises ``||(W + D) K1 - V1||^2 + ridge ||D||^2`` over ``D = D P``.
    It is computed by the push-through identity as ``R (K1^T P K1 + ridge I)^-1 K1^T P``, an n x n system, or in the
    basis U, a k x k system, whichever is smaller. Both are symmetric; the paper's d_in x d_in system is not.

    Args:
        weight: W, (d_out, d_in).
        keys: K1 transposed, one row per edited token, (n, d_in).
        values: V1 transposed, (n, d_out).
        projection: The null space, or P itself as a symmetric projector, (d_in, d_in).
        ridge: Weight of the size penalty. The paper uses 1, AlphaEdit 10 on language models, the authors' code 200.
        ridge_rule: ``absolute``, or ``mean_diagonal``: ``ridge`` times the mean of the diagonal of K1^T P K1, which
            makes it independent of the scale of the keys.
        previous_moment: Kp Kp^T of the keys of earlier edits, (d_in, d_in), which this edit should not undo
            (AlphaEdit): ``Delta = R K1^T P ((K1 K1^T + Kp Kp^T) P + ridge I)^-1``.
        sums: Sums of ``keys`` and ``values``, used instead of them if there are many keys.
        system: The system of these keys, if it is known already; ``projection``, ``ridge``, ``ridge_rule`` and
            ``previous_moment`` are then not read.

    Returns:
        Delta, (d_out, d_in), in the weight's dtype. Its rows lie in the range of P, so ``K0 @ Delta.mT`` is zero.

    Raises:
        ValueError: Shapes do not match, values are not finite, or the ridge is negative or too small to solve with.
    """
    if sums is None:
        _, keys, values = _checked_edit(weight, keys, values)
    moment = None if sums is None else sums.moment
    system = system or system_of(keys, projection, ridge, ridge_rule, previous_moment, moment)
    return system.change(null_space_coefficients(weight, keys, values, system, sums)).to(weight)


def null_space_coefficients(
    weight: Tensor, keys: Tensor, values: Tensor, system: NullSpaceSystem, sums: KeySums | None = None
) -> Tensor:
    """The left factor of Delta, from which ``system.change`` makes it; arguments are those of `null_space_update`."""
    if sums is not None:
        return system.coefficients_of_sums(sums.residual)
    weight, keys, values = _checked_edit(weight, keys, values)
    return system.coefficients((values - keys @ weight.mT).mT)


def least_squares_update(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    retained_moment: Tensor,
    ridge: float = 0.0,
    retain_weight: float = 1.0,
    sums: KeySums | None = None,
    system: LeastSquaresSystem | None = None,
) -> Tensor:
    """Weight change of the unconstrained objective (paper Eq. 6), a compromise between retained and edited outputs.

    ``Delta = R K1^T (retain_weight K0 K0^T + K1 K1^T + ridge I)^-1`` minimises
    ``||(W + D) K1 - V1||^2 + retain_weight ||D K0||^2 + ridge ||D||^2``. MEMIT is this function with its lambda
    (15000 on language models) as ``retain_weight`` and the mean second moment K0 K0^T / n as ``retained_moment``.

    Args:
        weight: W, (d_out, d_in).
        keys: K1 transposed, (n, d_in).
        values: V1 transposed, (n, d_out).
        retained_moment: K0 K0^T, (d_in, d_in).
        ridge: Weight of the size penalty; needed if K0 and K1 together do not span all d_in directions.
        retain_weight: Weight of the retained keys.
        sums: As in `null_space_update`.
        system: The system of these keys, if it is made already; the three arguments before ``sums`` are then not read.

    Returns:
        Delta, (d_out, d_in), in the weight's dtype.

    Raises:
        ValueError: As in `null_space_update`, or the system is singular.
    """
    if sums is not None:
        system = system or LeastSquaresSystem(sums.moment, retained_moment, ridge, retain_weight)
        return system.solve(sums.residual).to(weight)
    return _least_squares(weight, keys, values, retained_moment, ridge, retain_weight, system).to(weight)


def least_squares_condition(
    keys: Tensor,
    retained_moment: Tensor,
    ridge: float = 0.0,
    retain_weight: float = 1.0,
    sums: KeySums | None = None,
) -> float:
    """Condition number of the system that `least_squares_update` solves; it takes the same arguments."""
    moment = second_moment(keys) if sums is None else sums.moment
    return LeastSquaresSystem(moment, retained_moment, ridge, retain_weight).condition_number


def ridge_map_update(
    weight: Tensor,
    keys: Tensor,
    targets: Tensor,
    preserved_keys: Tensor | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
) -> Tensor:
    """New weight of Unified Concept Editing (Gandikota et al., 2024; paper Prop. 3 and App. B plus the code's ridge).

    ``W' = (lamb W + s_e sum v* c^T + s_p sum W c_p c_p^T) (lamb I + s_e sum c c^T + s_p sum c_p c_p^T)^-1``. The first
    factor is ``W`` times the inverse of the second plus ``s_e sum (v* - W c) c^T``, so W' - W is
    `least_squares_update` with ridge ``lamb / s_e`` and retain weight ``s_p / s_e``; call that function if you have the
    second moment of the preserved keys. The ridge pulls towards W, not towards zero as in the paper's App. B.

    Args:
        weight: W, (d_out, d_in).
        keys: Embeddings c of the edited concepts, (n, d_in).
        targets: Outputs v* that they should have, usually ``guide_keys @ weight.mT``, (n, d_out).
        preserved_keys: Embeddings c_p whose outputs should stay, (m, d_in); None for none.
        erase_scale: s_e, positive.
        preserve_scale: s_p.
        lamb: Pull towards the present weight; the larger it is, the less the weight changes.

    Returns:
        W', (d_out, d_in), in the weight's dtype.

    Raises:
        ValueError: As in `least_squares_update`, or ``erase_scale`` is not positive.
    """
    if not (math.isfinite(erase_scale) and erase_scale > 0):
        raise ValueError(f"erase_scale={erase_scale} must be a positive number; to erase less, raise lamb.")
    check_nonnegative("preserve_scale", preserve_scale)
    check_nonnegative("lamb", lamb)
    if preserved_keys is None:
        preserved_keys = weight.new_zeros(0, weight.shape[-1])
    preserved_keys = checked_matrix("preserved_keys", preserved_keys, (None, weight.shape[-1]))
    delta = _least_squares(
        weight, keys, targets, second_moment(preserved_keys), lamb / erase_scale, preserve_scale / erase_scale
    )
    return (delta + weight.to(delta)).to(weight)


def edit_report(
    weight: Tensor,
    delta: Tensor,
    keys: Tensor,
    retained_moment: Moment,
    null_space: NullSpaceOfKeys,
    ridge: float = 1.0,
    ridge_rule: RidgeRule = "absolute",
    previous_moment: Tensor | None = None,
    sums: KeySums | None = None,
    system: NullSpaceSystem | None = None,
    leak: float | None = None,
) -> dict[str, float]:
    """Measure how well a result of `null_space_update` keeps ``P K0 = 0`` and ``Delta K0 = 0``.

    Args:
        weight: W before the edit, (d_out, d_in).
        delta: The change, (d_out, d_in). Pass the difference of the stored weights to include the effect of rounding.
        keys: K1 transposed, (n, d_in).
        retained_moment: K0 K0^T, (d_in, d_in), or its few keys.
        null_space: The null space that ``delta`` was found with.
        ridge: As passed to `null_space_update`; it and the next two arguments only affect the condition number.
        ridge_rule: As passed to `null_space_update`.
        previous_moment: As passed to `null_space_update`.
        sums: As passed to `null_space_update`.
        system: The system that ``delta`` was solved from, if it is known, instead of the arguments before.
        leak: ``leak``, if it is known already (see `retained_outputs`).

    Returns:
        ``null_space_dimension``, k; ``keys_kept``, ||P K1|| / ||K1||: how much of the edited keys the projection keeps;
        ``retained_kept``, ||P K0|| / ||K0||, from the eigenvalues of the null space; ``leak``,
        ||Delta K0|| / ||W K0||; ``relative_norm``, ||Delta|| / ||W||; ``condition_number`` of the solved system. Norms
        are Frobenius norms. ``retained_kept`` and ``leak`` are computed from moments, so a true zero can appear as any
        value up to about 1e-7. ||W K0|| is summed in float32, which moves ``leak`` by about 1e-6 of itself; the other
        norm, where large terms cancel, is in float64.
    """
    weight = checked_matrix("weight", weight, (None, None))
    delta = checked_matrix("delta", delta, tuple(weight.shape), weight.device)
    moment = _checked_moment(retained_moment, weight)
    if system is None:
        edited = None if sums is None else sums.moment
        if edited is None:
            keys = checked_matrix("keys", keys, (None, weight.shape[1]), weight.device)
        system = system_of(keys, null_space, ridge, ridge_rule, previous_moment, edited)
    eigenvalues = null_space.eigenvalues.to(weight)
    free = null_space.free.to(weight)  # 1 with a cut, else the share of a direction that is free
    kept = (free * null_space.own.to(weight)).sum() / eigenvalues.sum()
    if leak is None:
        leak = leak_of(delta, weight, moment, torch.float32)
    return {
        "null_space_dimension": float(null_space.dimension),
        "keys_kept": system.keys_kept,
        "retained_kept": float(kept.clamp(min=0.0).sqrt()),
        "leak": leak,
        "relative_norm": float(delta.norm() / weight.norm()),
        "condition_number": system.condition_number,
    }


def _checked_moment(moment: Moment, weight: Tensor) -> Moment:
    """The moment in float64 on the weight's device, after checks of its shape and its values."""
    d_in = weight.shape[1]
    if isinstance(moment, ThinMoment):
        return ThinMoment(checked_matrix("retained_moment", moment.rows, (None, d_in), weight.device))
    return checked_matrix("retained_moment", moment, (d_in, d_in), weight.device)


def _least_squares(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    retained_moment: Tensor,
    ridge: float,
    retain_weight: float,
    system: LeastSquaresSystem | None = None,
) -> Tensor:
    """`least_squares_update` before the cast to the weight's dtype."""
    weight, keys, values = _checked_edit(weight, keys, values)
    system = system or LeastSquaresSystem(keys.mT @ keys, retained_moment, ridge, retain_weight)
    residual = values - keys @ weight.mT
    return system.solve(residual.mT @ keys)


def _checked_edit(weight: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, keys and values in float64 on one device, after checks."""
    weight = checked_matrix("weight", weight, (None, None))
    d_out, d_in = weight.shape
    keys = checked_matrix("keys", keys, (None, d_in), weight.device)
    if len(keys) == 0:
        raise ValueError("keys is empty: an edit needs at least one token.")
    return weight, keys, checked_matrix("values", values, (len(keys), d_out), weight.device)
