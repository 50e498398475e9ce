"""UCE's debiasing: measures how often pictures show each attribute, and adjusts the attributes' weights."""

from __future__ import annotations

import torch
from torch import Tensor


def attribute_ratios(probabilities: Tensor) -> Tensor:
    """Share (A,), float64, of the pictures for which each attribute is the most probable one; the shares sum to 1.

    ``probabilities`` are those of each attribute in each picture, (n, A). Pictures without a judgement (nan) do not
    count; if none is left, the shares are nan.
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
        tolerance: A phrase keeps its weights if all its shares are within this distance of the wished ones, or if its
            shares were not measured (nan).

    Returns:
        (P, A). If measured and wished shares each sum to one, the sum of each phrase's weights does not change.
    """
    missing = (wished - ratios).nan_to_num(0.0)
    moving = missing.abs().amax(-1, keepdim=True) > tolerance
    return alphas + step * missing * moving
