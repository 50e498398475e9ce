"""Losses of the gradient methods as functions of the UNet's predictions."""

from __future__ import annotations

from torch import Tensor


def esd_target(noise_pred_from: Tensor, noise_pred_concept: Tensor, noise_pred_uncond: Tensor, eta: float) -> Tensor:
    """What the edited model should predict: ``e_from - eta (e_c - e_0)``, away from the concept (ESD, 2025 code).

    The paper (Gandikota et al., 2023) starts at the unconditional prediction, ``e_0 - eta (e_c - e_0)``: pass
    ``noise_pred_uncond`` as ``noise_pred_from`` too. With ``c_from = c`` the form here with ``eta + 1`` equals the
    paper's with ``eta``.

    The coefficients sum to 1, so the same formula holds for velocities (v-prediction): at given x_t and t, noise is an
    affine function of velocity, ``alpha v + sigma x_t``, and affine functions commute with such sums.

    Args:
        noise_pred_from: e_from, the frozen model's prediction for the prompt to erase the concept from, (B, C, H, W).
        noise_pred_concept: e_c, its prediction for the concept's prompt, (B, C, H, W).
        noise_pred_uncond: e_0, its prediction for the empty prompt, (B, C, H, W).
        eta: Strength of the negative guidance.

    Returns:
        (B, C, H, W).
    """
    return noise_pred_from - eta * (noise_pred_concept - noise_pred_uncond)
