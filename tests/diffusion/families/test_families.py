"""Every family draws what diffusers' own pipeline draws, and writes what that reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.families import FAMILIES
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.pipeline import Pipeline

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 4
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
FOLDERS = ["tiny_sd", "tiny_sdxl", "tiny_sdxl_empty", "tiny_sd3", "tiny_sd3_without_t5"]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def reference_of(folder: Path) -> DiffusionPipeline:
    """The pipeline of diffusers in ``folder``, which must be told that it has no T5."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "tiny-sd3-clip" else {}
    return DiffusionPipeline.from_pretrained(folder, **absent)


def theirs(folder: Path, noise: Tensor, guidance_scale: float) -> Tensor:
    """Pictures by the pipeline of diffusers, of the same noise."""
    pipeline = reference_of(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        output_type="pt",
        height=16,
        width=16,
    )
    return drawn.images.float()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_it_draws_what_diffusers_draws(folder: Path, guidance_scale: float) -> None:
    pipeline = load_pipeline(str(folder))
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert_close(drawn, theirs(folder, pipeline.initial_noise(SEEDS), guidance_scale), **TOLERANCE)
    others = pipeline.draw(["a cat in the rain", "a toy"], SEEDS, STEPS, guidance_scale)
    assert (drawn - others).abs().flatten(1).amax(1).min() > 1e-3


def test_what_it_saves_is_read_by_diffusers(folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(folder))
    with torch.no_grad():
        for name, weight in pipeline.named_parameters().items():
            if name.endswith(("to_v.weight", "add_v_proj.weight")):
                weight.mul_(1.5)
    pipeline.save(tmp_path / folder.name)
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    assert_close(drawn, theirs(tmp_path / folder.name, pipeline.initial_noise(SEEDS), 4.0), **TOLERANCE)
    assert (drawn - theirs(folder, pipeline.initial_noise(SEEDS), 4.0)).abs().max() > 1e-3


def test_pictures_become_latents_and_back_as_in_diffusers(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    reference = reference_of(folder)
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    config = reference.vae.config
    with torch.no_grad():
        mean = reference.vae.encode(pictures * 2 - 1).latent_dist.mean
        latents = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
        decoded = reference.vae.decode(mean).sample / 2 + 0.5
    assert_close(pipeline.encode_pictures(pictures), latents)
    assert_close(pipeline.decode(latents), decoded.clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_a_chain_that_begins_later_ends_where_the_whole_one_does(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    condition, noise = pipeline.encode(PROMPTS), pipeline.initial_noise(SEEDS)
    with torch.no_grad():
        whole = [step.latents for step in pipeline.chain([condition], noise, STEPS, 1.0)]
        rest = pipeline.sample(condition, whole[1], STEPS, 1.0, start=2)
    if pipeline.flow or type(pipeline).__name__ == "StableDiffusionXL":  # one-step samplers, which remember nothing
        assert_close(rest, whole[-1])
    assert rest.shape == whole[-1].shape


def test_weights_have_the_names_of_diffusers(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    reference = reference_of(folder)
    models = {name: part for name, part in reference.components.items() if isinstance(part, torch.nn.Module)}
    expected = {f"{part}.{name}" for part, module in models.items() for name, _ in module.named_parameters()}
    assert set(pipeline.named_parameters()) == expected


def test_a_family_that_is_not_known_is_refused_with_those_that_are(tiny_sd: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = tmp_path / "other"
    shutil.copytree(tiny_sd, copy)
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "SanaPipeline"}), encoding="utf-8")
    with pytest.raises(ValueError, match="SanaPipeline") as caught:
        load_pipeline(str(copy))
    assert all(family.title in str(caught.value) for family in FAMILIES.values())
    assert issubclass(FAMILIES["StableDiffusionXLPipeline"], Pipeline)
