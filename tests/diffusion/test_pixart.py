from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import build_pixart
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import PixArtAlpha, PixArtSigma
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import layer_label, match_parameters
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.diffusion.text_ways import way_of

PROMPTS, SEEDS, STEPS = ["A dog at sunset", "an owl"], [11, 5], 3


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PixArt-Alpha for 1024 pixels, which is told the size of a picture."""
    return build_pixart(tmp_path_factory.mktemp("models") / "told", alpha=True, sample_size=128)


@pytest.fixture(params=["tiny_pixart", "tiny_pixart_sigma", "told"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def loaded(folder: Path) -> PixArtAlpha:
    """With pictures of 16 by 16 pixels."""
    found = load_pipeline(str(folder))
    assert isinstance(found, PixArtAlpha)
    found.transformer.register_to_config(sample_size=8)  # its embeddings of positions stay as they are
    assert found.picture_size == (16, 16)
    return found


def drawn_by(folder: Path, pipeline: PixArtAlpha, guidance_scale: float, **options: Any) -> Tensor:
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(theirs).__name__ == type(pipeline).index_class
    theirs.set_progress_bar_config(disable=True)
    found: Tensor = theirs(
        options.pop("prompts", PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=pipeline.initial_noise(SEEDS),
        height=16,
        width=16,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
        **options,
    ).images
    return found


# --- pictures


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_pictures_equal_those_of_diffusers(guidance_scale: float, folder: Path) -> None:
    pipeline = loaded(folder)
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert drawn.shape == (2, 3, 16, 16)
    print("DIFF", float((drawn - drawn_by(folder, pipeline, guidance_scale)).abs().max()))
    assert_close(drawn, drawn_by(folder, pipeline, guidance_scale), rtol=0, atol=1e-4)
    moved = (drawn - pipeline.draw(PROMPTS[::-1], SEEDS, STEPS, guidance_scale)).abs()
    print("MOVED", moved.amax(dim=(1, 2, 3)))
    assert moved.amax(dim=(1, 2, 3)).min() > 1e-2
