from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.attention_resteering import attention_resteering_loss, attention_share

LENGTH = 6


def attention(seed: int = 0, batch: int = 3) -> list[Tensor]:
    """Attention of three layers that differ in heads and pixels, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 2, 9, LENGTH), (batch, 4, 4, LENGTH), (batch, 1, 16, LENGTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1) for shape in shapes]


MASK = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
"""One, three and two tokens of the concept."""


def sums_by_hand(layers: list[Tensor]) -> list[float]:
    """Sum of the squares of the marked probabilities of each item, number by number."""
    sums = []
    for item in range(len(MASK)):
        terms = []
        for layer in layers:
            for head in layer[item].tolist():
                for pixel in head:
                    terms += [p * p for place, p in enumerate(pixel) if MASK[item, place]]
        sums.append(math.fsum(terms))
    return sums


def test_both_forms_equal_a_count_by_hand_in_a_batch_of_different_token_counts() -> None:
    layers = attention()
    sums = sums_by_hand(layers)
    # Float64 sums in another order.
    assert_close(float(attention_resteering_loss(layers, MASK, "sum_of_squares")), sum(sums) / 3, rtol=1e-13, atol=0)
    by_hand = sum(math.sqrt(total) for total in sums) / 3
    assert_close(float(attention_resteering_loss(layers, MASK, "norm")), by_hand, rtol=1e-13, atol=0)


def test_for_one_item_the_norm_is_that_of_all_numbers_together() -> None:
    layers = attention(batch=1)
    mask = MASK[1:2]
    together = torch.cat([layer[..., mask[0]].flatten() for layer in layers])  # as the reference concatenates them
    assert_close(attention_resteering_loss(layers, mask, "norm"), together.norm(), rtol=1e-14, atol=0)


def test_items_of_a_batch_do_not_touch_each_other() -> None:
    layers = attention()
    for form in ("norm", "sum_of_squares"):
        single = [attention_resteering_loss([a[i : i + 1] for a in layers], MASK[i : i + 1], form) for i in range(3)]
        assert_close(attention_resteering_loss(layers, MASK, form), torch.stack(single).mean(), rtol=1e-14, atol=0)
    # One norm over the whole batch, as a batch of the reference would have it, is another number.
    whole = torch.cat([layer[i][..., MASK[i]].flatten() for layer in layers for i in range(3)]).norm()
    assert abs(float(whole) - float(attention_resteering_loss(layers, MASK, "norm"))) > 0.1


def test_the_sum_of_squares_is_the_square_and_its_gradient_scales_with_the_norm() -> None:
    layers = [layer.requires_grad_(True) for layer in attention(batch=1)]
    mask = MASK[1:2]
    norm = attention_resteering_loss(layers, mask, "norm")
    squares = attention_resteering_loss(layers, mask, "sum_of_squares")
    assert_close(squares, norm.square(), rtol=1e-14, atol=0)
    of_norm, of_squares = torch.autograd.grad(norm, layers), torch.autograd.grad(squares, layers)
    for small, large in zip(of_norm, of_squares, strict=True):
        assert_close(large, 2 * norm.detach() * small, rtol=1e-13, atol=0)
        assert small[..., mask[0]].abs().min() > 0
        assert torch.equal(small[..., ~mask[0]], torch.zeros_like(small[..., ~mask[0]]))


def test_attention_that_is_gone_has_a_gradient() -> None:
    layers = [torch.zeros(2, 2, 4, LENGTH, requires_grad=True) for _ in range(2)]
    attention_resteering_loss(layers, MASK[:2], "norm").backward()
    assert all(layer.grad is not None and torch.equal(layer.grad, torch.zeros_like(layer)) for layer in layers)


def test_half_precision_is_summed_in_single() -> None:
    layers = [torch.full((1, 8, 4096, LENGTH), 0.5, dtype=torch.bfloat16)]
    # 8 x 4096 pixels, one token at 1/2 each. Bfloat16 would round the sum to a multiple of 64, or stop counting at 64.
    assert_close(float(attention_resteering_loss(layers, MASK[:1], "sum_of_squares")), 8192.0, rtol=1e-6, atol=0)


def test_the_share_of_even_attention_is_that_of_the_tokens() -> None:
    even = [torch.full_like(layer, 1 / LENGTH) for layer in attention()]
    assert_close(float(attention_share(even, MASK)), (1 + 3 + 2) / 3 / LENGTH, rtol=1e-12, atol=0)
    assert_close(float(attention_share(attention(), torch.ones_like(MASK))), 1.0, rtol=1e-12, atol=0)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="form='square' is unknown: choose one of norm, sum_of_squares"):
        attention_resteering_loss(attention(), MASK, "square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="marks no token in some prompt"):
        attention_resteering_loss(attention(), MASK & torch.tensor([[True], [True], [False]]))
