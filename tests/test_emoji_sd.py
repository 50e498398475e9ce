"""The embedded model: it loads in plain diffusers and draws what it is asked to; an edit takes one concept out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.sampling import initial_noise
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.judges.classifier import ClassifierJudge

MODEL = Path(resolve_model("emoji-sd"))


@pytest.fixture(scope="module")
def judge() -> ClassifierJudge:
    return ClassifierJudge(MODEL / "judge")


def test_files_are_safetensors_and_small() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}


def test_layout_is_stable_diffusions() -> None:
    index = json.loads((MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["text_encoder"][1] == "CLIPTextModel"
    config = json.loads((MODEL / "text_encoder/config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] >= 6


@pytest.mark.parametrize("kind", [DiffusionPipeline, StableDiffusionPipeline])
def test_plain_diffusers_draws_the_same_picture(kind: type[DiffusionPipeline], judge: ClassifierJudge) -> None:
    pipeline = kind.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    components = load_pipeline("emoji-sd")
    noise = initial_noise(components.unet, [3])
    theirs = pipeline(
        "a dog at sunset", num_inference_steps=10, guidance_scale=4.0, latents=noise, output_type="pt"
    ).images
    ours = components.draw(["a dog at sunset"], [3], 10, 4.0)
    # Both run in float32; only the order of sums differs.
    torch.testing.assert_close(ours, theirs.cpu(), rtol=0, atol=2e-3)
    assert judge(ours, [load_concept_set("emoji20").get("dog").question]).item() > 0.5


@pytest.mark.slow
def test_an_edit_takes_one_concept_out_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_unlearn.cli import main

    monkeypatch.chdir(tmp_path)
    quick = ["--config", "null_space.yaml", "--concept", "dog", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *quick, "--model.init_args.rounds", "1"]) == 0
    assert main(["test", *quick, "--data.init_args.images_per_prompt", "1"]) == 0
    scores = Scores.load(next(tmp_path.rglob("scores.json")))
    assert scores.before is not None
    assert scores.before.forget is not None and scores.forget is not None
    assert scores.before.retain is not None and scores.retain is not None
    assert scores.before.forget <= 0.1
    assert scores.forget >= 0.7
    assert scores.retain >= scores.before.retain - 0.05
    assert next(tmp_path.rglob("grid.png")).stat().st_size > 10_000
