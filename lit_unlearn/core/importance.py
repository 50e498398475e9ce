"""Importance sampling from a mixture of two noised pictures, and rules that subtract one gradient from another.

Source: Alberti et al., *Data Unlearning in Diffusion Models* (SISS), ICLR 2025. ``x`` is a picture to keep, ``a`` one
to forget, ``γ = sqrt(ᾱ_t)``, ``σ = sqrt(1 − ᾱ_t)``, ``q(·|x) = N(γ x, σ² I)``. The mixture
``q_λ(m|x, a) = (1 − λ) q(m|x) + λ q(m|a)`` covers both, so one forward at ``m`` estimates the losses of both:

    E_{m ~ q_λ}[w_x(m) f(m)] = E_{m ~ q(·|x)}[f(m)],   w_x = q(m|x) / q_λ(m) = 1 / ((1 − λ) + λ q_a/q_x)
    E_{m ~ q_λ}[w_a(m) f(m)] = E_{m ~ q(·|a)}[f(m)],   w_a = q(m|a) / q_λ(m) = 1 / ((1 − λ) q_x/q_a + λ)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.system.devices import float64_device


def choose_forget(uniform: Tensor, mixture: float) -> Tensor:
    """Choose which items of a batch come from ``q(·|a)``: each independently, with probability λ.

    Args:
        uniform: Uniform numbers in [0, 1), (B,).
        mixture: λ; 0 never chooses ``a``, 1 always.

    Returns:
        (B,), bool.
    """
    return uniform < mixture


def mixture_noises(
    keep: Tensor, forget: Tensor, noise: Tensor, from_forget: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The noises that would lead to ``m`` from ``x`` and from ``a``: ``ε_x = (m − γ x) / σ``, ``ε_a = (m − γ a) / σ``.

    For the picture that ``m`` was made from, this is ``noise``, bit for bit; the other one differs from it by
    ``γ/σ (x − a)``.

    Args:
        keep: Latents x, (B, ...).
        forget: Latents a, same shape.
        noise: The noise that both share, standard normal, same shape.
        from_forget: Whether m was made from a, (B,), bool.
        alpha: γ, broadcastable to the latents.
        sigma: σ, broadcastable to the latents.

    Returns:
        ε_x and ε_a, of the latents' shape.
    """
    shift = alpha / sigma * (keep - forget)
    chosen = from_forget.view(-1, *[1] * (keep.ndim - 1))
    return torch.where(chosen, noise - shift, noise), torch.where(chosen, noise, noise + shift)


def log_density_ratio(noise_keep: Tensor, noise_forget: Tensor) -> Tensor:
    """``log q(m|a) − log q(m|x) = (‖ε_x‖² − ‖ε_a‖²) / 2``, (B,), float64, of ``ε_x`` and ``ε_a`` (B, ...).

    It is computed as ``⟨ε_x − ε_a, ε_x + ε_a⟩ / 2``, since the squares of almost equal pictures would cancel.
    """
    device = float64_device(noise_keep.device)
    keep, forget = noise_keep.to(device).double(), noise_forget.to(device).double()
    difference, total = keep - forget, keep + forget
    return (difference * total).flatten(1).sum(dim=1) / 2


def importance_weights(log_ratio: Tensor, mixture: float) -> tuple[Tensor, Tensor]:
    """``w_x`` and ``w_a`` from the logarithm of ``q_a/q_x``, without exponentiating it.

    ``w_x = sigmoid(log((1−λ)/λ) − r) / (1−λ)`` and ``w_a = sigmoid(log(λ/(1−λ)) + r) / λ``, written with
    ``log(e^u + e^v)`` so that λ = 0 and λ = 1 are not special cases. ``(1−λ) w_x + λ w_a = 1``, hence
    ``w_x ≤ 1/(1−λ)`` and ``w_a ≤ 1/λ``. At λ = 0, ``w_a`` is the plain ratio, which is unbounded; at λ = 1, ``w_x`` is.

    Args:
        log_ratio: r = ``log q(m|a) − log q(m|x)``, (B,); plus and minus infinity are allowed.
        mixture: λ, in [0, 1].

    Returns:
        ``w_x`` and ``w_a``, (B,).
    """
    keep = log_ratio.new_tensor(math.log1p(-mixture) if mixture < 1 else -math.inf)
    forget = log_ratio.new_tensor(math.log(mixture) if mixture > 0 else -math.inf)
    # If r is infinite, or λ is 0 or 1, one of the two terms is -inf, and logaddexp returns the other one.
    weight_keep = torch.exp(-torch.logaddexp(keep, _add(forget, log_ratio)))
    weight_forget = torch.exp(-torch.logaddexp(_add(keep, -log_ratio), forget))
    return weight_keep, weight_forget


def _add(log_share: Tensor, log_ratio: Tensor) -> Tensor:
    """Add the two logarithms; a share of zero stays zero, also if the ratio is infinite."""
    return torch.where(log_share.isneginf(), log_share, log_share + log_ratio)


def deletion_coefficients(n: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``n/(n−k)`` and ``k/(n−k)`` (paper, Prop. 1): weights of the losses on all ``n`` pictures and on ``k`` of them.

    The difference of the two weighted losses is the loss on the other ``n − k`` pictures.
    """
    return n / (n - k), k / (n - k)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all ``gradients`` as one vector, a scalar in float32 or better."""
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm()


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of gradients as vectors, a scalar in float32 or better."""
    return torch.stack([(u.float() * v.float()).sum() for u, v in zip(first, second, strict=True)]).sum()


def subtraction_scale(
    keep: Sequence[Tensor], forget: Sequence[Tensor], *, fraction: float | None = None, norm: float | None = None
) -> Tensor:
    """The factor ``s`` of ``g = g_x − s g_a`` that gives the subtracted gradient a fixed norm.

    Args:
        keep: g_x.
        forget: g_a.
        fraction: Norm of ``s g_a`` as a fraction of the norm of ``g_x``.
        norm: Norm of ``s g_a`` itself (``scaling_norm`` of the reference), used instead of ``fraction``.

    Returns:
        s, a scalar; 0 if ``g_a`` is 0, since a zero gradient cannot be scaled to a norm.
    """
    size = global_norm(forget)
    wanted = (
        fraction * global_norm(keep) if fraction is not None else torch.as_tensor(float(norm or 0), device=size.device)
    )
    return torch.where(size > 0, wanted / size, 0)


def erase_diff_scale(keep: Sequence[Tensor], forget: Sequence[Tensor], eta: float) -> Tensor:
    """``max(η − ⟨g_x, g_a⟩ / ‖g_a‖², 0)``, a scalar: how much of ``g_a`` EraseDiff adds to ``g_x`` (Wu et al., 2024).

    It is the smallest s for which a step also lowers the forget loss: ``⟨g_x + s g_a, g_a⟩ ≥ η ‖g_a‖²``. It is 0 if
    ``g_a`` is 0.
    """
    square = global_norm(forget).square()
    scale = (eta - inner_product(keep, forget) / square).clamp_min(0)
    return torch.where(square > 0, scale, 0)
