"""UCE's debiasing: how often pictures show each attribute, and what follows for the weights of the attributes."""

from __future__ import annotations

import torch
from torch import Tensor


def attribute_ratios(probabilities: Tensor) -> Tensor:
    """Share (A,), float64, of the pictures (n, A) that show each attribute most probably; the shares sum to 1.

    Pictures without a judgement (nan) do not count; without any picture the shares are nan.
    """
    judged = probabilities[~probabilities.isnan().any(-1)]
    return torch.bincount(judged.argmax(-1), minlength=probabilities.shape[-1]).double() / len(judged)


def debiasing_step(alphas: Tensor, ratios: Tensor, wished: Tensor, step: float, tolerance: float) -> Tensor:
    """Weights of the attributes after a round: ``alpha + step (wished - measured)``, as in UCE's code.

    Args:
        alphas: Weight of each attribute for each phrase, (P, A).
        ratios: Measured shares, (P, A).
        wished: Wished shares, (P, A).
        step: Size of the step.
        tolerance: A phrase all of whose shares are so near to the wished ones keeps its weights, and so does one
            without a measurement (nan).

    Returns:
        (P, A). Where shares and wishes sum to one, the sum of each phrase's weights stays as it was.
    """
    missing = (wished - ratios).nan_to_num(0.0)
    moving = missing.abs().amax(-1, keepdim=True) > tolerance
    return alphas + step * missing * moving
