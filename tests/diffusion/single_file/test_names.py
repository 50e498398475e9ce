"""diffusers' own converters make the same weights again of what our map has put into the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from helpers import draw_weights, normal, original
from lit_unlearn.diffusion.single_file import names

PREFIX = "model.diffusion_model."


def drawn(module: nn.Module) -> dict[str, Tensor]:
    """All weights of ``module``, no two of which are alike."""
    draw_weights(module, 0, 1.0)
    for number, value in enumerate(module.parameters()):
        value.data += number  # norms would be equal
    return module.state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_unet_and_autoencoder(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    unet, vae = drawn(pipeline.unet), drawn(pipeline.vae)
    stored = original(unet, PREFIX, names.unet, frozenset(["input_blocks.2.0.op.weight"]))
    assert_same(convert_ldm_unet_checkpoint(stored, dict(pipeline.unet.config)), unet)
    stored = original(vae, "first_stage_model.", names.autoencoder, frozenset(["decoder.up.1.block"]))
    assert stored["first_stage_model.encoder.mid.attn_1.q.weight"].dim() == 4  # as published
    assert_same(convert_ldm_vae_checkpoint(stored, dict(pipeline.vae.config)), vae)


def test_open_clip() -> None:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=8,
    )
    model = CLIPTextModelWithProjection(config)
    expected = drawn(model)
    stored = original(expected, "conditioner.embedders.1.model.", names.open_clip)
    found = convert_open_clip_checkpoint(model, stored, prefix="conditioner.embedders.1.model.")
    assert not torch.equal(expected["text_projection.weight"], expected["text_projection.weight"].T)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}], ids=["3", "3.5"])
def test_stable_diffusion_3(options: dict[str, Any]) -> None:
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        caption_projection_dim=8,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=4,
        **options,
    )
    expected = drawn(model)
    keys = frozenset(["joint_blocks.0.context_block.mlp.fc1.weight"])  # the last block has none
    stored = original(expected, PREFIX, names.stable_diffusion_3, keys)
    assert_same(convert_sd3_transformer_checkpoint_to_diffusers(stored), expected)


def test_flux() -> None:
    """The converter has the width 3072 written into it; the columns, which it leaves alone, are few here."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    rows = {name: value.shape[0] for name, value in model.state_dict().items()}
    expected = {
        name: normal(size, *((2,) if name.endswith("weight") and "norm_" not in name else ()), seed=number).bfloat16()
        for number, (name, size) in enumerate(rows.items())
    }
    stored = original(expected, PREFIX, names.flux)
    assert stored[f"{PREFIX}single_blocks.0.linear1.weight"].shape[0] == 7 * 3072
    assert_same(convert_flux_transformer_checkpoint_to_diffusers(stored), expected)
