"""A run of data unlearning from the command line: where it lies, and what its test says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_unlearn import cli
from lit_unlearn.callbacks.memorisation import MemorisationReport
from lit_unlearn.data.images import KeepForgetImages
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.evaluation.memorisation import CopyDetector, pixel_features
from lit_unlearn.methods.siss import SISS
from lit_unlearn.methods.value_refinement import ValueRefinement

RUN = Path("logs/siss/version_0")


@pytest.fixture(scope="module")
def options(tiny_sd: Path, keep_forget: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``siss.yaml`` on a tiny pipeline, with a random judge."""
    judge = tmp_path_factory.mktemp("judge")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        JudgeTraining(width=8).save_pretrained(judge)
    values = {
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": "1",
        "trainer.enable_model_summary": "false",
        "model.init_args.model": str(tiny_sd),
        "model.init_args.judge": str(judge),
        "model.init_args.num_inference_steps": "2",
        "data.init_args.held_out": "null",
        "data.init_args.steps": "2",
        "data.init_args.images_per_prompt": "2",
        **{f"data.init_args.{name}": path for name, path in keep_forget.items()},
    }
    return ["--config", "siss.yaml", *(f"--{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def tested(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which SISS was run and tested; not to be written to."""
    folder = tmp_path_factory.mktemp("tested")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["fit", *options]) == 0
        assert cli.main(["test", *options]) == 0
    return folder


@pytest.fixture
def workplace(tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(tested, tmp_path / "workplace")
    monkeypatch.chdir(tmp_path / "workplace")
    return tmp_path / "workplace"


@pytest.fixture
def content(tested: Path) -> dict[str, Any]:
    return json.loads((tested / RUN / "memorisation.json").read_text(encoding="utf-8"))


def test_a_run_without_a_concept_lies_below_its_method(tested: Path) -> None:
    names = {path.relative_to(tested / RUN).as_posix() for path in (tested / RUN).rglob("*")}
    assert {"config.yaml", "config_test.yaml", "memorisation.json", "grid.png", "checkpoints/last.ckpt"} <= names
    edit = read_edit(tested / RUN / "checkpoints" / "last.ckpt")
    assert (edit.method, edit.concepts) == ("SISS", [])


def test_the_report_says_what_was_compared(content: dict[str, Any], keep_forget: dict[str, str], tiny_sd: Path) -> None:
    images = KeepForgetImages(**keep_forget)
    assert content["method"] == "siss"
    assert content["images"] == images.identity
    assert content["backbone"]["name"] == str(tiny_sd)
    assert [entry["caption"] for entry in content["forget"]] == ["a dog", "a cat"]
    assert set(content["thresholds"]) == {"pixels", "features"}
    assert content["cost"]["unet_forwards"] == 2 * 16
    assert content["edit"]["weight_change_ratio"] > 0
    for measured in (content["before"], content["after"]):
        assert (measured["forget"]["pictures"], measured["keep"]["pictures"]) == (4, 2)  # "an owl" is only to be kept
        assert set(measured["copied_images"]) == {"pixels", "features"}


def test_the_shares_are_those_of_the_pictures(
    content: dict[str, Any], tested: Path, tiny_sd: Path, keep_forget: dict[str, str]
) -> None:
    module = SISS(model=str(tiny_sd), judge=None, num_inference_steps=2, guidance_scale=4.0)
    module.configure_model()
    images = KeepForgetImages(**keep_forget, images_per_prompt=2)
    detector = CopyDetector(
        {"pixels": pixel_features}, module.reconstructions(images.forget), module.reconstructions(images.keep), 0.01
    )
    assert content["thresholds"]["pixels"] == pytest.approx(detector.thresholds["pixels"], rel=1e-4)
    items = images.test_items
    before = module.generate([item.prompt for item in items], [item.seed for item in items])
    read_edit(tested / RUN / "checkpoints" / "last.ckpt").apply(module.pipeline)
    after = module.generate([item.prompt for item in items], [item.seed for item in items])
    assert not torch.equal(before, after)
    for pictures, measured in ((before, content["before"]), (after, content["after"])):
        found = detector(pictures.float() / 255)["pixels"]
        # Pictures of other batch sizes differ by a level or two of 255.
        assert measured["forget"]["pixels"]["distance"] == pytest.approx(float(found.distance[:4].mean()), abs=2e-3)
        assert measured["keep"]["pixels"]["known_distance"] == pytest.approx(float(found.known[4:].mean()), abs=2e-3)
    drift = (after.float() - before.float()).div(255).square().mean(dim=(1, 2, 3)).sqrt()
    assert content["after"]["keep"]["drift"] == pytest.approx(float(drift[4:].mean()), abs=2e-3)


def test_the_figure_and_tensorboard(tested: Path) -> None:
    with Image.open(tested / RUN / "grid.png") as grid:
        assert grid.height > 4 * 96 and grid.width > 5 * 96
    events = EventAccumulator(str(tested / RUN))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"test/forget/copies_pixels", "test/before/keep/copies_features"} <= scalars
    assert {"train/loss_keep", "train/loss_forget", "train/scale", "train/gradient_norm"} <= scalars
    assert events.Tags()["images"] == ["test/before_and_after"]


def test_a_test_is_not_replaced_without_a_word(
    workplace: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["test", *options]) == 2
    assert "memorisation.json exists: pass --overwrite" in capsys.readouterr().err
    before = json.loads((RUN / "memorisation.json").read_text(encoding="utf-8"))
    assert cli.main(["test", *options, "--overwrite", "--model.init_args.copy_quantile=0.5"]) == 0
    after = json.loads((RUN / "memorisation.json").read_text(encoding="utf-8"))
    assert (before["copy_quantile"], after["copy_quantile"]) == (0.01, 0.5)
    assert after["thresholds"]["pixels"] > before["thresholds"]["pixels"]


def test_validate_and_predict(workplace: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", *options]) == 0
    assert "copies pixels" in capsys.readouterr().out
    assert cli.main(["predict", *options]) == 0
    written = {path.relative_to(RUN / "pictures").as_posix() for path in (RUN / "pictures").rglob("*.png")}
    captions = ("forget/000_a_cat", "forget/001_a_dog", "keep/002_an_owl")
    assert written == {f"{caption}-{i}.png" for caption in captions for i in range(2)}


def test_an_export_says_what_it_is(workplace: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = RUN / "checkpoints" / "last.ckpt"
    assert cli.main(["export", "--ckpt_path", str(path), "--output", "exported"]) == 0
    assert "without what it has unlearned" in capsys.readouterr().out
    assert "from which training pictures were unlearned" in Path("exported/README.md").read_text(encoding="utf-8")
    edit = read_edit(path)
    exported = load_pipeline("exported").named_parameters()
    assert all(torch.equal(exported[name], value) for name, value in edit.weights.items())


def test_a_report_needs_data_unlearning(
    refinement: Callable[..., ValueRefinement], trainer_with: Callable[..., L.Trainer], keep_forget: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"MemorisationReport reports on data unlearning.*ValueRefinement"):
        trainer_with(MemorisationReport()).test(refinement(), KeepForgetImages(**keep_forget))
    with pytest.raises(ValueError, match=r"MemorisationReport\.columns=0 is too small"):
        MemorisationReport(columns=0)
