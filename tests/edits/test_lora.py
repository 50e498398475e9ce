"""Low-rank exports: the best change of their rank, with names that diffusers reads as LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.edits.lora import AUTO_RESIDUAL, fits_lora, low_rank, parse_rank

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TEXT = "text_encoder.encoder.layers.1.mlp.fc2.weight"
CONVOLUTION = "unet.mid_block.resnets.0.conv1.weight"


@pytest.fixture
def base(components: StableDiffusion) -> dict[str, Tensor]:
    parameters = components.named_parameters()
    return {name: parameters[name].detach() for name in (LINEAR, TEXT, CONVOLUTION)}


def changed(base: dict[str, Tensor], ranks: dict[str, int]) -> dict[str, Tensor]:
    """``base`` plus random matrices of the given ranks."""
    generator = torch.Generator().manual_seed(0)
    edited = {}
    for name, rank in ranks.items():
        rows, columns = base[name].flatten(1).shape
        change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        edited[name] = base[name] + change.reshape(base[name].shape)
    return edited


def product(factors: dict[str, Tensor], name: str) -> Tensor:
    layer = name.removesuffix(".weight")
    a, b = (factors[f"{layer}.lora_{letter}.weight"] for letter in "AB")
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def test_base_plus_b_a_is_the_edit(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1, TEXT: 3, CONVOLUTION: 2})
    factors, report = low_rank(edited, base, None)
    assert report["rank"] == 3
    assert report["needed_rank"] == {LINEAR: 1, TEXT: 3, CONVOLUTION: 2}
    for name, value in edited.items():
        assert not torch.allclose(base[name], value, atol=1e-2)
        assert torch.allclose(base[name] + product(factors, name), value, atol=1e-4)
        assert report["residual"][name] < 1e-6
    # One rank for all: loaders that take alpha from the first layer then scale every layer by one.
    assert {value.shape[0] for name, value in factors.items() if "lora_A" in name} == {3}
    rows, columns = base[CONVOLUTION].shape[:2]
    layer = CONVOLUTION.removesuffix(".weight")
    assert factors[f"{layer}.lora_A.weight"].shape == (3, columns, 3, 3)
    assert factors[f"{layer}.lora_B.weight"].shape == (rows, 3, 1, 1)


def test_a_smaller_rank_leaves_out_what_eckart_and_young_say(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 6})
    factors, report = low_rank(edited, base, 2)
    singular = torch.linalg.svdvals((edited[LINEAR] - base[LINEAR]).double())
    expected = float(singular[2:].norm() / singular.norm())
    assert expected > 0.1
    assert report["residual"][LINEAR] == pytest.approx(expected, rel=1e-4)
    missing = edited[LINEAR] - base[LINEAR] - product(factors, LINEAR)
    assert float(missing.norm() / (edited[LINEAR] - base[LINEAR]).norm()) == pytest.approx(expected, rel=1e-4)


def test_auto_stops_at_its_residual(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1})
    edited[LINEAR] = edited[LINEAR] + 1e-6 * torch.randn(edited[LINEAR].shape)  # noise of full rank
    _, report = low_rank(edited, base, None)
    assert report["rank"] == 1
    assert 0 < report["residual"][LINEAR] <= AUTO_RESIDUAL


def test_a_rank_beyond_the_layers_is_cut_and_half_precision_is_counted(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 2})
    factors, report = low_rank(edited, base, 10_000, torch.float16)
    assert report["rank"] == min(base[LINEAR].shape)
    assert {value.dtype for value in factors.values()} == {torch.float16}
    assert 1e-6 < report["residual"][LINEAR] < 1e-2


def test_names_are_those_of_diffusers(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1, TEXT: 1})
    new, _ = low_rank(edited, base, 1)
    old, _ = low_rank(edited, base, 1, old_names=True)
    assert "text_encoder.encoder.layers.1.mlp.fc2.lora_A.weight" in new
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc2.lora_A.weight" in old
    assert {name for name in new if name.startswith("unet")} == {name for name in old if name.startswith("unet")}


@pytest.mark.parametrize("name", ["unet.conv_in.bias", "text_encoder.embeddings.token_embedding.weight"])
def test_what_lora_cannot_hold_is_refused_by_name(components: StableDiffusion, name: str) -> None:
    value = components.named_parameters()[name]
    assert not fits_lora(name, value)
    with pytest.raises(ValueError, match=rf"the edit changes {name}, which LoRA cannot hold"):
        low_rank({name: value + 1}, {name: value}, 1)


def test_an_unchanged_layer_has_no_residual(base: dict[str, Tensor]) -> None:
    factors, report = low_rank({LINEAR: base[LINEAR]}, base, None)
    assert (report["rank"], report["residual"]) == (1, {LINEAR: 0.0})
    assert not any(value.any() for value in factors.values())


def test_ranks() -> None:
    assert (parse_rank("auto"), parse_rank("8")) == (None, 8)
    for text in ("0", "-1", "1.5", "", "all", "9" * 5000):
        with pytest.raises(ValueError, match="must be a rank of at least 1, or auto"):
            parse_rank(text)
