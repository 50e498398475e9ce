"""Packed convolutions give the bits of PyTorch's own, are packed once for a block, and never outlive a change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_unlearn.diffusion import packed
from lit_unlearn.diffusion.packed import packable, packed_convolution, packing, processor_options, same_convolution


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the weights that are packed, in order; nothing is known of which kernels give the same bits."""
    made: list[int] = []
    find = packed._Block.find

    def record(block: packed._Block, x: Tensor, weight: Tensor, given: packed.Geometry) -> Tensor | None:
        before = block.bytes
        found = find(block, x, weight, given)
        if block.bytes > before:
            made.append(block.bytes - before)
        return found

    monkeypatch.setattr(packed._Block, "find", record)
    monkeypatch.setattr(packed, "_SAME", {})
    return made


def layer_and_input(dtype: torch.dtype = torch.float32, size: int = 3, stride: int = 1) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 48, size, stride, size // 2).to(dtype, memory_format=torch.channels_last)
    return layer.requires_grad_(False), torch.randn(2, 32, 6, 6).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_every_call_gives_the_bits_of_the_layer(
    dtype: torch.dtype, size: int, stride: int, packings: list[int]
) -> None:
    layer, x = layer_and_input(dtype, size, stride)
    with packing():
        outputs = [same_convolution(layer, x) for _ in range(3)]
    assert all(torch.equal(output, layer(x)) and output.stride() == layer(x).stride() for output in outputs)
    assert packings == [layer.weight.nbytes]


def test_a_block_never_reads_weights_of_the_one_before(packings: list[int]) -> None:
    layer, x = layer_and_input()
    arguments = layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    for _ in range(3):
        layer.weight.data.mul_(-1.5)  # which PyTorch does not count as a change
        with packing():
            assert torch.equal(same_convolution(layer, x), layer(x))
            assert torch.equal(same_convolution(layer, x), layer(x))
            torch.testing.assert_close(packed_convolution(x, layer.weight, *arguments), layer(x))
    assert len(packings) == 3


def test_without_a_block_nothing_is_packed(packings: list[int]) -> None:
    layer, x = layer_and_input()
    assert torch.equal(same_convolution(layer, x), layer(x))
    assert packings == []


def test_large_convolutions_and_more_than_the_limit_are_not_packed(
    packings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_and_input()
    large = torch.randn(2, 32, 64, 64)
    with packing():
        assert torch.equal(same_convolution(layer, large), layer(large))
        monkeypatch.setattr(packed, "MOST", layer.weight.nbytes - 1)
        assert torch.equal(same_convolution(layer, x), layer(x))
    assert packings == []


def test_kernels_that_give_other_bits_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_SAME", {})
    monkeypatch.setattr(packed, "_compute", lambda x, *_: torch.zeros(2, 48, 6, 6))
    layer, x = layer_and_input()
    with packing():
        assert all(torch.equal(same_convolution(layer, x), layer(x)) for _ in range(3))


def test_a_gradient_and_autocast_are_computed_as_always(packings: list[int]) -> None:
    layer, x = layer_and_input()
    with packing():
        assert same_convolution(layer, x.clone().requires_grad_()).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert same_convolution(layer, x).dtype == torch.bfloat16
    assert packings == []


def test_only_plain_convolutions_are_packable() -> None:
    assert packable(nn.Conv2d(4, 4, 3, padding=1))
    assert not packable(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    assert not packable(nn.Conv2d(4, 4, 3, padding="same"))
    assert not packable(nn.Conv1d(4, 4, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of what its compiler imports
def test_compiled_convolutions_are_packed_within_a_block_and_follow_the_weights(packings: list[int]) -> None:
    layer, x = layer_and_input()
    layers = nn.Sequential(layer, nn.Conv2d(48, 32, 1).requires_grad_(False)).to(memory_format=torch.channels_last)
    compiled = torch.compile(nn.Sequential.forward, options=processor_options())
    with torch.no_grad():
        for _ in range(2):
            layer.weight.data.mul_(-1.5)
            with packing():
                for _ in range(2):
                    torch.testing.assert_close(compiled(layers, x), layers(x))
        assert packings == 2 * [layer.weight.nbytes, layers[1].weight.nbytes]
        torch.testing.assert_close(compiled(layers, x), layers(x))
        assert len(packings) == 4
        with packing():
            torch.testing.assert_close(compiled(layers, x[:1]), layers(x[:1]))
        assert len(packings) == 6
