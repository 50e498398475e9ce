"""The loss of Forget-Me-Not (Zhang et al., 2023): how much attention a picture pays to the tokens of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

ResteeringForm = Literal["norm", "sum_of_squares"]


def attention_resteering_loss(probabilities: Sequence[Tensor], mask: Tensor, form: ResteeringForm = "norm") -> Tensor:
    """Size of the attention to the masked tokens, over all layers, heads and pixels (paper, Algorithm 1).

    ``sum_of_squares`` is the paper's formula, the sum over the layers of ``‖a‖²``. ``norm`` is what the reference code
    computes, the Frobenius norm of all these numbers together. It is the square root of ``sum_of_squares``, and for a
    single item its gradient has the same direction. Both are computed for each item of the batch and then averaged, so
    that an item has the same weight in every batch; for a batch of one the result is the reference's number.

    Args:
        probabilities: Cross-attention of each layer, (B, heads, pixels, L); heads and pixels may differ between layers.
        mask: Tokens of the concept in the prompt of each item, (B, L) bool; their number may differ between items.
        form: ``norm`` or ``sum_of_squares``.

    Returns:
        The loss, a scalar, float32 or better.

    Raises:
        ValueError: Unknown ``form``, or ``mask`` marks no token of an item.
    """
    if form not in get_args(ResteeringForm):
        raise ValueError(f"form={form!r} is unknown: choose one of {', '.join(get_args(ResteeringForm))}.")
    if not bool(mask.any(-1).all()):
        raise ValueError("mask marks no token in some prompt: mark at least one token in each prompt.")
    # Masked by a product, since prompts of a batch have different numbers of tokens. The norm of the layers' norms is
    # the norm of all numbers, and vector_norm has a gradient at zero, where the square root does not have one.
    layers = [_of_the_concept(layer, mask).flatten(1) for layer in probabilities]
    norms = torch.stack([torch.linalg.vector_norm(layer, dim=1) for layer in layers])  # (layers, B)
    per_item = torch.linalg.vector_norm(norms, dim=0) if form == "norm" else norms.square().sum(0)  # (B,)
    return per_item.mean()


def attention_share(probabilities: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Share of the attention that the masked tokens get, in [0, 1]: the mean over layers, heads, pixels and items."""
    return torch.stack([_of_the_concept(layer, mask).sum(-1).mean() for layer in probabilities]).mean()


def _of_the_concept(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Return ``probabilities`` (B, heads, pixels, L), at least float32, with zeros outside ``mask`` (B, L)."""
    if probabilities.dtype in (torch.float16, torch.bfloat16):
        probabilities = probabilities.float()
    return probabilities * mask[:, None, None, :].to(probabilities)
