"""Memory that is counted on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from lit_unlearn.diffusion.described import DescribedModel
from lit_unlearn.diffusion.footprint import (
    decode_bytes,
    descent_bytes,
    encode_bytes,
    module_bytes,
    peak_bytes,
    predict_bytes,
)

META = torch.device("meta")


def test_only_what_is_held_at_once_counts() -> None:
    x = torch.empty(10, 100, device=META)

    def chain() -> torch.Tensor:
        y = x + 1  # 4000 bytes
        y = y * 2  # as many, and y is still there
        return y.sum()  # the first is gone

    with torch.no_grad():
        assert peak_bytes([], chain) == 8000
    layer = nn.Linear(100, 50, device=META)
    with torch.no_grad():
        assert peak_bytes([layer], lambda: layer(x)) == 10 * 50 * 4
    assert module_bytes(layer) == (50 * 100 + 50) * 4


def test_attention_is_one_kernel() -> None:
    query, key, value = (torch.empty(1, 2, 1000, 8, device=META) for _ in range(3))
    attend = nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        for call in (lambda: attend(query, key, value), lambda: attend(query=query, key=key, value=value)):
            assert 2 * 1000 * 8 * 4 <= peak_bytes([], call) < 1000 * 1000 * 4  # no matrix of all pairs


def test_phases_of_a_pipeline(tiny_sd: object) -> None:
    pipeline = DescribedModel.find(str(tiny_sd)).pipeline(torch.float32)
    one, four = encode_bytes(pipeline, 1), encode_bytes(pipeline, 4)
    assert 0 < one < four <= 4 * one + 1000
    assert encode_bytes(pipeline, 4, "text_encoder") == four  # there is only one
    assert 0 < predict_bytes(pipeline, 1) < predict_bytes(pipeline, 2)
    pixels = 3 * pipeline.picture_size[0] * pipeline.picture_size[1]
    assert decode_bytes(pipeline, 1) >= 4 * pixels
    trained = [name for name in pipeline.named_parameters() if name.endswith("attn2.to_k.weight")]
    descent = descent_bytes(pipeline, 1, trained, through_text=False)
    gradients = 4 * sum(pipeline.named_parameters()[name].numel() for name in trained)
    assert descent > predict_bytes(pipeline, 1) + gradients
    assert descent_bytes(pipeline, 1, trained, through_text=True) >= descent
    assert not any(weight.requires_grad or weight.grad is not None for weight in pipeline.named_parameters().values())
    half = DescribedModel.find(str(tiny_sd)).pipeline(torch.bfloat16)
    assert predict_bytes(half, 1) < predict_bytes(pipeline, 1)
