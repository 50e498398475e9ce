from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny_families import build_flux
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import Flux
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import match_parameters
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.diffusion.text_ways import way_of

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("models") / "dev", True, shift=3.0, use_dynamic_shifting=True)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("models") / "schnell", False, shift=1.0)


@pytest.fixture(params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def loaded(folder: Path) -> Flux:
    """With pictures of 16 by 16 pixels."""
    found = load_pipeline(str(folder))
    assert isinstance(found, Flux) and found.latent_shape == (4, 128, 128)
    return replace(found, sample_size=8)


def drawn_by(folder: Path, pipeline: Flux, **options: Any) -> Tensor:
    theirs = FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    noise = pipeline.initial_noise(SEEDS)
    latents = theirs._pack_latents(noise, *noise.shape)
    size = {"height": 16, "width": 16}
    drawn = theirs(PROMPTS, num_inference_steps=STEPS, latents=latents, output_type="pt", **size, **options).images
    assert isinstance(drawn, Tensor)
    return drawn


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_equal_those_of_diffusers(guidance_scale: float, folder: Path) -> None:
    pipeline = loaded(folder)
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert drawn.shape == (2, 3, 16, 16)
    assert_close(drawn, drawn_by(folder, pipeline, guidance_scale=guidance_scale), rtol=0, atol=1e-4)
    assert (drawn - pipeline.draw(PROMPTS[::-1], SEEDS, STEPS, guidance_scale)).abs().max() > 1e-2
    moved = (drawn - pipeline.draw(PROMPTS, SEEDS, STEPS, 9.0)).abs().max()
    assert (moved > 1e-3) if folder.name == "dev" else (moved == 0)


def test_guidance_away_from_a_prompt_is_classifier_free(folder: Path) -> None:
    pipeline = loaded(folder)
    latents = pipeline.draw_latents(pipeline.encode(PROMPTS), SEEDS, STEPS, 4.0, pipeline.encode(["a castle"]))
    options = {"negative_prompt": ["a castle"] * 2, "true_cfg_scale": 4.0, "guidance_scale": 3.5}
    assert_close(pipeline.decode(latents), drawn_by(folder, pipeline, **options), rtol=0, atol=1e-4)


def test_a_condition_is_the_t5_and_the_pooled_vector_of_the_clip(dev: Path) -> None:
    pipeline = loaded(dev)
    condition, ids = pipeline.encode(PROMPTS), pipeline.tokenize(PROMPTS).ids
    assert condition.states.shape == (2, 512, 48) and condition.pooled is not None
    assert_close(condition.states, pipeline.text_encoder_2(ids[1]).last_hidden_state, rtol=0, atol=0)
    assert_close(condition.pooled, pipeline.text_encoder(ids[0]).pooler_output, rtol=0, atol=0)


def test_sites_of_the_groups(dev: Path) -> None:
    pipeline = loaded(dev)
    names = list(pipeline.named_parameters())
    expected = {
        "context": {
            "transformer.context_embedder.weight",
            "transformer.time_text_embed.text_embedder.linear_1.weight",
        },
        "joint-kv": {f"transformer.transformer_blocks.0.attn.add_{kind}_proj.weight" for kind in "kv"},
        "text-fc2": {
            *(f"text_encoder.encoder.layers.{number}.mlp.fc2.weight" for number in range(3)),
            *(f"text_encoder_2.encoder.block.{number}.layer.1.DenseReluDense.wo.weight" for number in range(2)),
        },
    }
    for group, sites in expected.items():
        assert set(match_parameters(group, names, pipeline.unread(names))) == sites, group
    condition = pipeline.encode(PROMPTS).detach()
    with capture_inputs(pipeline.sites(sorted(expected["context"]))) as seen, torch.no_grad():
        pipeline.predict(pipeline.initial_noise(SEEDS), torch.tensor(500), condition)
    for name, inputs in seen.items():
        way = way_of(name)
        assert way is not None
        found = pipeline.first_inputs(condition)[way]
        assert_close(found.squeeze(1) if way == "pooled" else found, inputs, rtol=0, atol=0)


def test_a_chain_goes_on_and_the_autoencoder_is_that_of_diffusers(dev: Path) -> None:
    pipeline = loaded(dev)
    condition, noise = pipeline.encode(PROMPTS).detach(), pipeline.initial_noise(SEEDS)
    steps = list(pipeline.chain([condition], noise, STEPS, 4.0))
    *_, last = pipeline.chain([condition], steps[0].latents, STEPS, 4.0, start=1)
    assert_close(last.latents, steps[-1].latents, rtol=0, atol=1e-5)
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = (pipeline.vae.encode(pictures * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    assert_close(pipeline.encode_pictures(pictures), expected, rtol=0, atol=1e-6)


def test_what_is_saved_is_what_is_loaded(dev: Path, tmp_path: Path) -> None:
    pipeline = loaded(dev)
    before = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    with torch.no_grad():
        pipeline.transformer.context_embedder.weight.mul_(-1)
    pipeline.save(tmp_path / "saved")
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    assert_close(drawn_by(tmp_path / "saved", pipeline, guidance_scale=4.0), drawn, rtol=0, atol=1e-4)
    assert (drawn - before).abs().max() > 1e-3
    base = BaseModel.find(str(tmp_path / "saved"))
    assert base.sha256(torch.float32) == WholeModel.loaded(pipeline).sha256()
    base.check_steps(STEPS, "steps")


REFUSED = {
    "another T5": ({"joint_attention_dim": 64}, "joint_attention_dim=64 and text_encoder_2 d_model=48"),
    "another CLIP": ({"pooled_projection_dim": 8}, "pooled_projection_dim=8 and text_encoder hidden_size=16"),
    "more channels": ({"in_channels": 96}, "a quarter of transformer in_channels=24"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes: dict[str, int], reason: str, dev: Path, tmp_path: Path) -> None:
    shutil.copytree(dev, tmp_path / "copy")
    file = tmp_path / "copy/transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        check_model(str(tmp_path / "copy"))
