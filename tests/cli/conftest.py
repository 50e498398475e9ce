"""A recipe on a tiny pipeline, a finished run of it, and a check that a command refuses before it does anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import files
from lit_unlearn import cli
from lit_unlearn.diffusion import base_model
from lit_unlearn.emoji.judge import JudgeTraining

STEPS = 2
"""Denoising steps of every picture here."""


@pytest.fixture(scope="session")
def recipe(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A null-space edit of two layers with a random judge, in two seconds."""
    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    JudgeTraining(width=8).save_pretrained(folder / "judge")
    content = {
        "method": "null_space",
        "concept": "dog",
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "EvaluationReport"}],
        },
        "edit": {"class_path": "NullSpace", "init_args": {"threshold": 0.1, "minimum": 4}},
        "model": {
            "class_path": "ValueRefinement",
            "init_args": {
                "model": str(tiny_sd),
                "judge": str(folder / "judge"),
                "num_inference_steps": STEPS,
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
            },
        },
        "data": {"class_path": "ConceptPrompts", "init_args": {"steps": 2, "images_per_prompt": 1}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which dog was edited once; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["fit", "--config", str(recipe)]) == 0
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run_folder(finished: Path, workplace: Path) -> Path:
    """The folder of a finished run, below the folder to work in."""
    shutil.copytree(finished / "logs", workplace / "logs")
    return Path("logs/null_space/dog/version_0")


@pytest.fixture
def refuses(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail before it loads a model or writes anything, and returns its one sentence."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base_model, "load_parts", loaded)

    def run(*args: str) -> str:
        before = files(workplace)
        capsys.readouterr()
        assert cli.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert files(workplace) == before
        return line.removeprefix("lit-unlearn: error: ")

    return run


@pytest.fixture
def judge(recipe: Path, workplace: Path) -> str:
    """The recipe's judge, but for its bias towards dogs."""
    folder = workplace / "judge"
    shutil.copytree(recipe.parent / "judge", folder)
    place = json.loads((folder / "config.json").read_text(encoding="utf-8"))["attributes"]["subject"].index("dog")
    weights = load_file(folder / "model.safetensors")
    weights["heads.subject.bias"][place] += 100
    save_file(weights, folder / "model.safetensors")
    return str(folder)
