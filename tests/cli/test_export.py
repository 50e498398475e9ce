"""Exports are the edited model, say where they came from, and never half replace anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import modeling_utils
from safetensors.torch import load_file, save_file

from helpers import assert_alike, files, metadata, read_picture
from lit_unlearn import cli
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.sampling import initial_noise
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

STEPS = 2
"""Denoising steps of every picture, as in the recipe."""


def test_an_exported_pipeline_is_the_edited_model(run_folder: Path, tiny_sd: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "out"]) == 0
    pipeline = DiffusionPipeline.from_pretrained("out")
    state = torch.load(ckpt_path, weights_only=True)
    expected = dict(load_pipeline(str(tiny_sd)).named_parameters())
    names = state[CHECKPOINT_KEY]["edited_names"]
    for part in ("text_encoder", "unet", "vae"):
        for name, value in getattr(pipeline, part).named_parameters():
            full = f"{part}.{name}"
            assert torch.equal(value, state["state_dict"][full] if full in names else expected[full]), full

    pipeline.set_progress_bar_config(disable=True)
    latents = initial_noise(pipeline.unet, [0])
    picture = pipeline("a dog", num_inference_steps=STEPS, guidance_scale=4.0, latents=latents).images[0]
    assert cli.main(["generate", "a dog", "-o", "a.png", "--ckpt_path", ckpt_path, "--scale", "1"]) == 0
    assert_alike(read_picture("a.png"), picture)


def test_an_export_says_where_it_came_from(run_folder: Path, recipe: Path, tiny_sd: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["test", "--config", str(recipe)]) == 0
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "out", "--dtype", "float16"]) == 0
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "out", "--delta"]) == 0
    facts = json.loads(Path("out/provenance.json").read_text(encoding="utf-8"))
    assert (facts["concepts"], facts["method"]) == (["dog"], "ValueRefinement")
    assert re.fullmatch(f"{tiny_sd.name}@[0-9a-f]{{12}}", facts["base_model"])
    assert facts["config"]["rounds"] == 1
    assert facts["scores"]["forget"] == json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))["forget"]
    of_delta = {
        name: json.loads(value) for name, value in metadata("out/delta.safetensors").items() if name != "format"
    }
    own = {"kind", "weights_sha256", "files", "dtype", "kept", "left_out"}  # of what lies in the one and in the other
    assert {k: v for k, v in of_delta.items() if k not in own} == {k: v for k, v in facts.items() if k not in own}
    assert f"| forget | {facts['scores']['before']['forget']:.3f} |" in Path("out/README.md").read_text(
        encoding="utf-8"
    )
    assert {value.dtype for value in load_file("out/unet/diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    assert set(load_file("out/delta.safetensors")) == set(facts["edited_weights"])


def test_casting_makes_diffusers_say_nothing(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It speaks of modules to be kept in float32 whenever a model is cast, and lists none."""
    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda message, *args: said.append(message))
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "out", "--dtype", "bfloat16"]) == 0
    assert said == []


def test_a_low_rank_warns(run_folder: Path) -> None:
    command = ["export", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--output", "out", "--lora"]
    with pytest.warns(UserWarning, match=r"rank 1 leaves out \d\d% of the change of .* --lora auto 99.9%"):
        assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "auto", "--overwrite"]) == 0  # warnings are errors here


def test_an_export_replaces_only_exports(
    run_folder: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--output"]
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work", encoding="utf-8")
    assert refuses("export", *arguments, "mine").startswith("output=mine exists: choose another name")
    assert refuses("export", *arguments, "mine", "--overwrite").startswith("output=mine is a folder but no export")


def test_a_failed_export_leaves_the_old_one(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--output", "out"]
    assert cli.main(arguments) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    def disk_full(pipeline: StableDiffusion, folder: Path) -> None:
        (folder / "half").write_text("...", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StableDiffusion, "save", disk_full)
    assert cli.main([*arguments, "--overwrite"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "lit-unlearn: error: Could not write out: No space left on device (what was there is unchanged); "
        "free some space, then run the same command again."
    )
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert {path.name for path in Path().iterdir()} == {"logs", "out"}
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["folder", "delta", "picture"])
def test_a_base_that_differs_elsewhere_is_refused(
    run_folder: Path, broken_model: Callable[..., Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(folder: Path) -> None:
        path = folder / "vae/diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights["quant_conv.bias"] += 1
        save_file(weights, path, metadata={"format": "pt"})

    ckpt_path, other = str(run_folder / "checkpoints/last.ckpt"), str(broken_model(change))
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "edit.safetensors", "--delta"]) == 0
    before = files(Path())
    command = {
        "folder": ["export", "--output", "out"],
        "delta": ["export", "--output", "out", "--delta"],
        "picture": ["generate", "a dog", "--output", "a.png"],
    }[kind]
    assert cli.main([*command, "--ckpt_path", "edit.safetensors", "--model", other]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"does not fit model={other!r}, whose vae differs: use the model that it was made on.")
    assert files(Path()) == before


def test_a_full_disk_is_one_sentence(
    workplace: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    assert cli.main(["generate", "a dog", "-o", "a.png", "--model", str(tiny_sd), "--num_inference_steps", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lit-unlearn: error: Could not write a.png: No space left on device; free some space, then run the same "
        "command again."
    )
    assert list(workplace.iterdir()) == []
