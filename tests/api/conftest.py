"""A recipe on a tiny pipeline, an edit by it, and an empty folder to work in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import lit_unlearn as lu
from lit_unlearn.emoji.judge import JudgeTraining


@pytest.fixture(scope="session")
def recipe(tiny_sd: Path, pets: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCE with a random judge, in a second."""
    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    JudgeTraining(width=8).save_pretrained(folder / "judge")
    model = {"model": str(tiny_sd), "concept_set": pets, "judge": str(folder / "judge"), "num_inference_steps": 2}
    content = {
        "method": "uce",
        "concept": "cat",
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "EvaluationReport"}]},
        "edit": {"class_path": "RidgeMap", "init_args": {"lamb": 0.1}},
        "model": {"class_path": "UCE", "init_args": {**model, "guidance_scale": 2.0}},
        "data": {"class_path": "ConceptPrompts", "init_args": {"images_per_prompt": 1}},
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
        lu.edit("dog", recipe=recipe)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edit(finished: Path, workplace: Path) -> lu.Edit:
    """An edit of the dog whose run's folder may be written to."""
    shutil.copytree(finished / "logs", workplace / "logs")
    (path,) = Path("logs").rglob("last.ckpt")
    return lu.Edit(path)
