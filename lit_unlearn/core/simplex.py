"""Projection onto the probability simplex, which relaxes the choice of a token to weights of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def project_to_simplex(points: Tensor) -> Tensor:
    """Project each row onto the probability simplex, to the nearest point by Euclidean distance.

    The algorithm is that of Duchi et al. (2008), Fig. 1.

    Args:
        points: (..., n), float.

    Returns:
        (..., n): no entry is negative, and each row sums to 1.
    """
    ordered = points.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    support = (ordered * counts > excess).sum(-1, keepdim=True)  # how many entries stay positive
    shift = excess.gather(-1, support - 1) / support
    return (points - shift).clamp_min(0)
