"""Prompts that are read earlier: as diffusers does, with the layers that nothing reads then, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.testing import assert_close

from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import how_to_draw
from lit_unlearn.diffusion.described import DescribedModel
from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.families import FAMILIES
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.system.errors import UserError

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3
SKIPPING = ["tiny_sd", "tiny_sd2", "tiny_sdxl", "tiny_sd3", "tiny_sd3_without_t5"]
"""Models of the families that diffusers reads earlier."""

Model = Callable[[str], Path]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    """The folder of a model by the name of its fixture."""
    return request.getfixturevalue  # type: ignore[no-any-return]


def theirs(folder: Path) -> Any:
    """The pipeline of diffusers, whose ``clip_skip`` works beside transformers 5 too."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name.endswith("without-t5") else {}
    made = DiffusionPipeline.from_pretrained(folder, **absent)
    made.set_progress_bar_config(disable=True)
    if not hasattr(made.text_encoder, "text_model"):  # where it looks for the final norm
        object.__setattr__(made.text_encoder, "text_model", made.text_encoder)
    return made


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("name", "clip_skip"), [*((name, 1) for name in SKIPPING), ("tiny_sd", 2)])
def test_pictures_are_those_of_diffusers(name: str, clip_skip: int, guidance_scale: float, model: Model) -> None:
    folder = model(name)
    pipeline = Pipeline.load(folder, clip_skip=clip_skip, device="cpu")
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    noise = pipeline.initial_noise(SEEDS)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "latents": noise, "output_type": "pt"}
    expected = theirs(folder)(PROMPTS, guidance_scale=guidance_scale, clip_skip=clip_skip, **options).images
    assert_close(drawn, expected, rtol=0, atol=1e-4)
    others = Pipeline.load(folder, device="cpu").draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert (drawn - others).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_negative_prompt_is_not_read_earlier(name: str, model: Model) -> None:
    folder = model(name)
    pipeline, prompt, negative = Pipeline.load(folder, clip_skip=1, device="cpu"), PROMPTS[:1], "a cat"
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt"}
    options |= {"latents": pipeline.initial_noise(SEEDS[:1]), "negative_prompt": negative, "clip_skip": 1}
    expected = theirs(folder)(prompt[0], **options).images
    for away, is_same in ((pipeline.unskipped, True), (pipeline, False)):
        latents = pipeline.draw_latents(pipeline.encode(prompt), SEEDS[:1], STEPS, 4.0, away.encode([negative]))
        assert (bool((pipeline.decode(latents) - expected).abs().max() < 1e-4)) is is_same
    assert pipeline.clip_skip == 1 and pipeline.unskipped.unskipped.clip_skip is None


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("name", SKIPPING)
def test_layers_act_where_they_are_said_to(name: str, clip_skip: int | None, model: Model) -> None:
    """By brute force: each layer is changed, and prompts are read again."""
    base = BaseModel.find(str(model(name)), clip_skip=clip_skip)
    pipeline = base.load(device=torch.device("cpu"))
    before, drawn = pipeline.encode(PROMPTS), pipeline.draw(PROMPTS, SEEDS, 1, 1.0)
    empty = pipeline.unconditional().states
    unread = base.unread(base.names)
    changed = [
        n for n in base.names if n.startswith("text_encoder") and n.endswith(("fc2.weight", "DenseReluDense.wo.weight"))
    ]
    assert len(changed) >= 3
    skipped = 0
    for full in changed:
        part, number = full.split(".")[0], int(next(piece for piece in full.split(".") if piece.isdigit()))
        number_of_layers = sum(other.startswith(f"{part}.") for other in changed)
        weight, value = pipeline.named_parameters()[full], pipeline.named_parameters()[full].clone()
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            found = pipeline.encode(PROMPTS)
            moves = {"tokens": not torch.equal(found.states, before.states)}
            if found.pooled is not None and before.pooled is not None:
                moves["pooled"] = not torch.equal(found.pooled, before.pooled)
            pictures = pipeline.draw(PROMPTS, SEEDS, 1, 1.0)
            guidance_moves = not torch.equal(pipeline.unconditional().states, empty)
            weight.copy_(value)
        places = base.read_after[part]
        said = {way: way in places and number <= number_of_layers + places[way] for way in moves}
        assert moves == said, full
        assert (full in unread) is not any(said.values())
        assert (not torch.equal(pictures, drawn)) is any(said.values())
        # Guidance leads away from the empty prompt as the model itself reads it, if not from zeros.
        own = type(pipeline).read_after[part]["tokens"]
        zeros = getattr(pipeline, "force_zeros_for_empty_prompt", False)
        assert guidance_moves is (not zeros and number <= number_of_layers + own)
        skipped += not said["tokens"]
    assert skipped == {"tiny_sd": 0, "tiny_sd2": 0}.get(name, 2) + (
        0 if clip_skip is None else len(type(pipeline).skips)
    )


def test_the_final_norm_is_read_if_it_follows(tiny_sd: Path, tiny_sdxl: Path) -> None:
    norms = "text_encoder.final_layer_norm.weight", "text_encoder.final_layer_norm.bias"
    for folder, unread in ((tiny_sd, False), (tiny_sdxl, True)):
        base = BaseModel.find(str(folder), clip_skip=1)
        assert [name in base.unread(base.names) for name in norms] == [unread] * 2


def test_pictures_with_it_have_another_key(tiny_sd: Path, tiny_sdxl: Path) -> None:
    for folder in (tiny_sd, tiny_sdxl):
        keys = {Drawing.of(Pipeline.load(folder, clip_skip=k, device="cpu"), STEPS, 4.0).key for k in (None, 1)}
        assert len(keys) == 2
    assert "clip_skip" not in Pipeline.load(tiny_sd, device="cpu").settings()  # keys of older caches stay
    two = Pipeline.load(tiny_sd, clip_skip=2, device="cpu")
    assert two.settings()["clip_skip"] == 2 and two.with_sampler("ddim").clip_skip == 2


@pytest.mark.parametrize(
    ("name", "clip_skip", "message"),
    [
        ("tiny_sd", 0, r"clip_skip=0 must be a whole number of at least 1, as in diffusers"),
        ("tiny_sd", 1.5, r"clip_skip=1.5 must be a whole number"),
        ("tiny_sd", True, r"clip_skip=True must be a whole number"),
        ("tiny_sd", 3, r"clip_skip=3 leaves text_encoder of model='.*', which has 3 layers, none .* give at most 2\."),
        ("tiny_sdxl", 2, r"clip_skip=2 leaves text_encoder of model='.*', which has 3 layers, .* at most 1\."),
        ("tiny_sd3", 2, r"clip_skip=2 leaves text_encoder of .*: give at most 1\."),
        ("tiny_flux", 1, r"clip_skip=1 has no effect: model='.*' is of FLUX.*; leave it out\."),
        ("tiny_pixart", 1, r"clip_skip=1 has no effect: model='.*' is of PixArt.*; leave it out\."),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    name: str, clip_skip: Any, message: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(name)
    monkeypatch.setattr(base_model, "load_parts", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=f"^{message}"):
        Pipeline.load(folder, clip_skip=clip_skip)
    with pytest.raises(ValueError, match=f"^{message}"):
        DescribedModel.find(str(folder), clip_skip=clip_skip)


def test_a_described_model_is_read_earlier_too() -> None:
    base = DescribedModel.find("sdxl", clip_skip=2)
    pipeline = base.pipeline(torch.float32)
    assert [text.layer for text in pipeline.texts] == [-4, -4] and not pipeline.texts[0].normed
    layers = {name.split(".")[3] for name in base.unread(base.names) if ".layers." in name}
    assert layers == {"9", "10", "11"}  # of 12, all of text_encoder; text_encoder_2 still leads to the pooled vector


def test_other_programs_are_told_of_what_is_known() -> None:
    names = [f"text_encoder.encoder.layers.{number}.mlp.fc1.weight" for number in range(12)]
    said = {family.index_class: how_to_draw(family, 2, names) for family in FAMILIES.values() if family.skips}
    assert said == {
        "StableDiffusionPipeline": 'draw with clip_skip=2 in diffusers, in web UIs with "Clip skip" 3, in ComfyUI with '
        "CLIP Set Last Layer -3",
        "StableDiffusionXLPipeline": "draw with clip_skip=2 in diffusers, in ComfyUI with CLIP Set Last Layer -4",
        "StableDiffusion3Pipeline": "draw with clip_skip=2 in diffusers",
    }
    assert {how_to_draw(family, None, names) for family in FAMILIES.values()} == {""}
    of_sd2 = DescribedModel.find("sd2", clip_skip=2)
    assert how_to_draw(of_sd2.family, 2, of_sd2.names) == "draw with clip_skip=2 in diffusers"
