"""Checks and a linear solver that the closed forms share, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_unlearn.system.devices import solving_device


def checked_moment(name: str, moment: Tensor, d_in: int | None = None, device: torch.device | None = None) -> Tensor:
    """Return ``moment`` in float64; raise ValueError unless it is a finite, symmetric (d_in, d_in) matrix."""
    moment = checked_matrix(name, moment, (d_in, d_in), device)
    if moment.shape[0] != moment.shape[1]:
        raise ValueError(f"{name} has shape {tuple(moment.shape)}, expected a square matrix: pass second_moment(keys).")
    if (moment - moment.mT).abs().max() > 1e-6 * moment.abs().max():
        raise ValueError(f"{name} is not symmetric: pass second_moment(keys) or a sum of such moments.")
    return moment


def checked_matrix(
    name: str, matrix: Tensor, shape: tuple[int | None, ...], device: torch.device | None = None
) -> Tensor:
    """Return ``matrix`` in float64 on `solving_device` of ``device``, by default of the matrix's own device.

    Raises:
        ValueError: It does not have the given shape (None: any size), or is not finite.
    """
    if matrix.dim() != 2 or any(want not in (None, have) for want, have in zip(shape, matrix.shape, strict=True)):
        expected = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(
            f"{name} has shape {tuple(matrix.shape)}, expected ({expected}): rows are tokens (flatten batches), "
            "columns the features of the layer."
        )
    matrix = matrix.to(solving_device(matrix.device if device is None else device)).double()
    # A sum is finite only if all its terms are, and needs no copy of the matrix.
    if not bool(matrix.sum().isfinite()) and not bool(matrix.isfinite().all()):
        num_bad = int((~matrix.isfinite()).sum())
        raise ValueError(
            f"{name} holds {num_bad} values that are not finite: if they were computed in half precision, use float32."
        )
    return matrix


def check_nonnegative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and not negative, as the weight of a term must be."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be a finite number, zero or larger.")


class SingularSystemError(ValueError):
    """A system that cannot be solved: its keys do not determine the solution, and its ridge is too small."""


def condition_number(system: Tensor) -> float:
    """Largest eigenvalue of a symmetric system divided by the smallest; infinite if the smallest is not positive."""
    spectrum = torch.linalg.eigvalsh(system)
    return float(spectrum[-1] / spectrum[0]) if spectrum[0] > 0 else math.inf


def solve_positive_definite(system: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``right @ system^-1`` for a symmetric positive definite system."""
    return torch.cholesky_solve(right.mT, cholesky_factor(system, "ridge", ridge)).mT


def cholesky_factor(system: Tensor, field: str, ridge: float) -> Tensor:
    """L with ``L L^T = system``.

    Args:
        system: Symmetric and positive definite.
        field: The user's name of the ridge, for the message.
        ridge: The ridge on its diagonal, for the message.

    Raises:
        SingularSystemError: Up to rounding, ``system`` is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    # A singular matrix may fail the factorisation or leave tiny pivots, depending on rounding, so both are checked.
    rounding = len(system) * torch.finfo(system.dtype).eps * system.diagonal().max()
    if int(info) != 0 or bool(factor.diagonal().min().square() <= rounding):
        raise SingularSystemError(
            f"The {len(system)} x {len(system)} system is singular with {field}={ridge:g}: the keys are linearly "
            f"dependent or do not span all directions. Pass a larger {field}."
        )
    return factor
