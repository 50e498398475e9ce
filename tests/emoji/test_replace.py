"""The embedded model is replaced by a step of its own, if what takes its place is as good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from helpers import CONFIGS, files
from lit_unlearn import cli
from lit_unlearn.callbacks.export import SavePretrained
from lit_unlearn.emoji import replace
from lit_unlearn.emoji.figures import worse
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.emoji.text_to_image import TextToImageTraining
from lit_unlearn.emoji.vae import VAETraining

PUBLISHED: dict[str, Any] = json.loads((CONFIGS.parent / "docs/results/emoji_sd.json").read_text(encoding="utf-8"))
FEW = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"]
FEW += ["--trainer.enable_model_summary=false", "--data.num_validation=8", "--data.steps_per_epoch=2"]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the embedded model where it is found first, below the folder to work in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CONFIGS.parent / "checkpoints/emoji-sd", "checkpoints/emoji-sd")
    return Path("checkpoints/emoji-sd")


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def saved(module: Any, run: Path) -> Path:
    module.save_pretrained(run / "pretrained" / module.part)
    return run


def test_two_steps_of_training_leave_the_embedded_model_alone(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(shipped)
    assert cli.main(["fit", "--config", "emoji/judge.yaml", *FEW, "--data.batch_size=4"]) == 0
    run = Path("logs/emoji/judge/version_0")
    assert {"pretrained/judge/config.json", "pretrained/judge/model.safetensors"} <= files(run)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert content(shipped) == before

    # The step that puts it in place measures it.
    figures = str(CONFIGS.parent / "docs/results/emoji_sd.json")
    assert replace.main([str(run), "--figures", figures]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"error: The new model is worse than the published one, so {shipped} stays: drawings subject "
    )
    assert content(shipped) == before
    assert [path.name for path in shipped.parent.iterdir()] == [shipped.name]


def test_what_is_as_good_takes_the_place_of_its_part(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(shipped)
    run = saved(JudgeTraining(width=8), Path("run"))
    measured: list[str] = []
    for name, found in (("figures_of_parts", PUBLISHED), ("figures_of_pictures", (PUBLISHED, {}))):
        monkeypatch.setattr(replace, name, lambda *_, name=name, found=found: measured.append(name) or found)
    assert replace.main(["run", "--figures", str(CONFIGS.parent / "docs/results/emoji_sd.json")]) == 0
    assert measured == ["figures_of_parts", "figures_of_pictures"]
    after = content(shipped)
    assert {name for name in before if after[name] != before[name]} == {"judge/config.json", "judge/model.safetensors"}
    assert after["judge/model.safetensors"] == (run / "pretrained/judge/model.safetensors").read_bytes()


def test_pictures_of_another_model_do_not_stay(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(VAETraining(), Path("run"))
    for name, found in (("figures_of_parts", PUBLISHED), ("figures_of_pictures", (PUBLISHED, {}))):
        monkeypatch.setattr(replace, name, lambda *_, found=found: found)
    before = files(shipped)
    assert replace.main(["run", "--figures", str(CONFIGS.parent / "docs/results/emoji_sd.json")]) == 0
    assert before - files(shipped) == {"unedited.safetensors"}


def test_a_run_that_has_trained_nothing_is_refused(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replace.main(["logs", "--figures", str(CONFIGS.parent / "docs/results/emoji_sd.json")]) == 2
    assert "logs has no pretrained with weights" in capsys.readouterr().err
    assert replace.main(["logs", "--figures", "none.json"]) == 2
    assert "figures=none.json does not exist" in capsys.readouterr().err


def test_figures_are_worse_by_more_than_chance() -> None:
    assert worse(PUBLISHED, PUBLISHED) == []
    slightly = {**PUBLISHED, "direct": {"mean": 0.97, "least": 0.65}, "psnr_db": 25.5}
    assert worse(slightly, PUBLISHED) == []
    found = {**PUBLISHED, "direct": {"mean": 0.9, "least": 0.5}, "psnr_db": 20.0}
    assert worse(found, PUBLISHED) == [
        "direct mean 90.0% instead of 98.5%",
        "direct least 50.0% instead of 80.0%",
        "PSNR 20.0 dB instead of 26.4",
    ]


def test_the_unet_is_trained_with_the_parts_of_runs_or_of_the_model(shipped: Path) -> None:
    run = saved(VAETraining(block_out_channels=(8, 16)), Path("vae"))
    module = TextToImageTraining(vae=str(run))
    assert module.parts == {
        "vae": run / "pretrained/vae",
        "text_encoder": shipped / "text_encoder",
        "tokenizer": shipped / "tokenizer",
    }
    assert module.unet.config["sample_size"] == 24  # halved once by this autoencoder, twice by that of the model
    with pytest.raises(
        ValueError, match=r"the run vae has no text_encoder \(vae/pretrained/text_encoder\): give a run"
    ):
        TextToImageTraining(text_encoder="vae")


@pytest.mark.parametrize("output", ["checkpoints/emoji-sd", "checkpoints/emoji-sd/judge", "checkpoints/x/../emoji-sd"])
def test_a_recipe_that_writes_over_the_embedded_model_is_refused(shipped: Path, output: str) -> None:
    with pytest.raises(ValueError, match="is an embedded model: leave it out"):
        SavePretrained(output).setup(L.Trainer(logger=False), torch.nn.Module(), "fit")  # type: ignore[arg-type]
    SavePretrained("checkpoints/mine").setup(L.Trainer(logger=False), torch.nn.Module(), "fit")  # type: ignore[arg-type]
