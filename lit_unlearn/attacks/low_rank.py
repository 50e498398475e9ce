"""Trains weights in place: all of them, or low-rank changes (LoRA, Hu et al., 2022) without new layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def full_rank(weight: Tensor) -> int:
    """Largest rank of ``weight`` as a matrix with a row for each output; 0 if it is a vector or a scalar."""
    return min(weight.shape[0], weight[0].numel()) if weight.ndim > 1 else 0


class FullChanges:
    """Weights that are trained themselves; the interface of ``LowRankChanges``.

    Args:
        weights: The weights.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = list(weights)

    @property
    def factors(self) -> list[nn.Parameter]:
        """All that is trained: the weights."""
        return self.weights

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Set the gradients."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient

    def write(self) -> None:
        """Do nothing, since a step has changed the weights."""


class LowRankChanges(FullChanges):
    """Weights W + B A with trained factors B and A; B = 0 at the start, so that nothing changes (Eq. 3 with α = r).

    The sum is written into the weights, so that the model computes as always. The gradients of the factors follow from
    the gradient G of a weight: G A^T for B, and B^T G for A.

    Args:
        weights: Matrices, or kernels of convolutions, which are matrices of (out, everything else) here.
        rank: r; a weight with a smaller full rank gets that one.
        generator: Generator of the initial A, uniform as in the paper's code, on the CPU.
    """

    def __init__(self, weights: Sequence[nn.Parameter], rank: int, generator: torch.Generator) -> None:
        super().__init__(weights)
        self.frozen = [weight.detach().clone() for weight in weights]
        self.ups, self.downs = [], []
        for weight in weights:
            inputs, own = weight[0].numel(), min(rank, full_rank(weight))
            down = (2 * torch.rand(own, inputs, generator=generator) - 1) / math.sqrt(inputs)
            self.downs.append(nn.Parameter(down.to(weight)))
            self.ups.append(nn.Parameter(torch.zeros(len(weight), own).to(weight)))

    @property
    def factors(self) -> list[nn.Parameter]:
        """All that is trained."""
        return self.ups + self.downs

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Set the gradients of the factors from those of the weights."""
        with torch.no_grad():
            for up, down, gradient in zip(self.ups, self.downs, gradients, strict=True):
                matrix = gradient.flatten(1)
                up.grad, down.grad = matrix @ down.mT, up.mT @ matrix

    def write(self) -> None:
        """Write W + B A into the weights."""
        with torch.no_grad():
            for weight, frozen, up, down in zip(self.weights, self.frozen, self.ups, self.downs, strict=True):
                weight.copy_(frozen + (up @ down).view_as(frozen))
