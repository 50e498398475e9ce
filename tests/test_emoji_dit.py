"""The second embedded model: it loads in plain diffusers and draws what it is asked to; an edit takes a concept out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.families import StableDiffusion3
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.judges.emoji import EmojiJudge, SecondEmojiJudge

MODEL = Path(resolve_model("emoji-dit"))


def test_files_are_safetensors_and_small() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".model", ".txt"}


def test_layout_is_stable_diffusion_3s() -> None:
    index = json.loads((MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    assert classes["text_encoder"] == classes["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert classes["text_encoder_3"] == "T5EncoderModel"
    assert classes["transformer"] == "SD3Transformer2DModel"


@pytest.mark.parametrize("kind", [DiffusionPipeline, StableDiffusion3Pipeline])
def test_plain_diffusers_draws_the_same_picture(kind: type[DiffusionPipeline]) -> None:
    theirs_pipeline = kind.from_pretrained(MODEL)
    theirs_pipeline.set_progress_bar_config(disable=True)
    pipeline = load_pipeline("emoji-dit")
    assert isinstance(pipeline, StableDiffusion3)
    noise = pipeline.initial_noise([3])
    theirs = theirs_pipeline(
        "a dog at sunset",
        num_inference_steps=10,
        guidance_scale=4.0,
        latents=noise,
        max_sequence_length=28,
        output_type="pt",
    ).images
    ours = pipeline.draw(["a dog at sunset"], [3], 10, 4.0)
    torch.testing.assert_close(ours, theirs.cpu(), rtol=0, atol=2e-3)  # only the order of float32 sums differs
    question = load_concept_set("emoji20").get("dog").question
    for judge in (EmojiJudge(), SecondEmojiJudge()):
        assert judge(ours, [question]).item() > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* ignores the rest")
def test_an_edit_takes_one_concept_out_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_unlearn.cli import main

    monkeypatch.chdir(tmp_path)
    quick = ["--config", "null_space_context.yaml", "--model", "emoji-dit", "--concept", "dog"]
    assert main(["fit", *quick, "--trainer.enable_progress_bar", "false"]) == 0
    assert main(["test", *quick, "--data.images_per_prompt", "1"]) == 0
    scores = Scores.load(next(tmp_path.rglob("scores.json")))
    assert scores.before is not None
    assert scores.before.forget is not None and scores.forget is not None
    assert scores.before.retain is not None and scores.retain is not None
    assert scores.before.forget <= 0.1
    assert scores.forget >= 0.9
    assert scores.retain >= scores.before.retain - 0.03
