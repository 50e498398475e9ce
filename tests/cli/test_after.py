"""``--after``: edits one after another are edits of all concepts so far, from the pretrained weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_unlearn import cli
from lit_unlearn.edits.checkpoint import read_edit

CHECKPOINT = Path("checkpoints", "last.ckpt")


def fit(recipe: Path, *options: str) -> None:
    assert cli.main(["fit", "--config", str(recipe), *options]) == 0


def test_a_sequence_ends_where_editing_all_at_once_does(run_folder: Path, recipe: Path) -> None:
    fit(recipe, "--concept", "walking", "--after", str(run_folder / CHECKPOINT))
    second = Path("logs/null_space/dog+walking/version_0")
    fit(recipe, "--concept", "surfing", "--after", str(second / CHECKPOINT))
    third = Path("logs/null_space/dog+walking+surfing/version_0")
    fit(recipe, "--concept", "[dog, walking, surfing]", "--method", "joint")
    (joint,) = Path("logs/joint").glob("*/version_0")
    after, at_once, alone = (read_edit(folder / CHECKPOINT) for folder in (third, joint, run_folder))
    assert after.concepts == ["dog", "walking", "surfing"]
    for name, weight in at_once.weights.items():
        assert torch.equal(after.weights[name], weight)
        assert (weight - alone.weights[name]).abs().max() > 1e-3
    assert after.hyper_parameters["earlier"] == ["dog", "walking"]


def test_a_stored_recipe_does_not_need_the_earlier_files(run_folder: Path, recipe: Path) -> None:
    fit(recipe, "--concept", "rain", "--after", str(run_folder / CHECKPOINT))
    folder = Path("logs/null_space/dog+rain/version_0")
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored["after"] is None
    assert stored["concept"] == ["dog", "rain"]
    assert stored["model"]["init_args"]["earlier"] == ["dog"]


def test_several_earlier_runs_and_concepts_that_are_there_already(run_folder: Path, recipe: Path) -> None:
    fit(recipe, "--concept", "cat")
    runs = [str(run_folder / CHECKPOINT), str(Path("logs/null_space/cat/version_0") / CHECKPOINT)]
    fit(recipe, "--concept", "[cat, owl]", "--after", json.dumps(runs))
    edit = read_edit(Path("logs/null_space/dog+cat+owl/version_0") / CHECKPOINT)
    assert (edit.concepts, edit.hyper_parameters["earlier"]) == (["dog", "cat", "owl"], ["dog", "cat"])


def test_what_cannot_follow_is_refused(
    run_folder: Path, recipe: Path, refuses: Callable[..., str], tiny_sd: Path
) -> None:
    earlier = str(run_folder / CHECKPOINT)
    said = refuses("fit", "--config", str(recipe), "--after", earlier)
    assert said == f"concept=dog adds nothing to what after={earlier} edits already (dog): name a new concept."
    said = refuses("fit", "--config", str(recipe), "--concept", "rain", "--after", "nothing.ckpt")
    assert "nothing.ckpt" in said
    options = ["--concept", "rain", "--model.concept_set", "paper20"]
    assert "concept set" in refuses("fit", "--config", str(recipe), *options, "--concept", "Eating", "--after", earlier)
    said = refuses("fit", "--config", str(recipe), "--concept", "rain", "--model.earlier", "[dog]")
    assert said == "model.earlier names 'dog', which is not edited: take it out, or edit it too."


def test_the_pairs_of_a_sequence_are_those_of_all_its_concepts(
    recipe: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(recipe, "--concept", "walking")
    walking = str(Path("logs/null_space/walking/version_0") / CHECKPOINT)
    fit(recipe, "--concept", "surfing", "--after", walking)
    assert "surfing → standing (not walking)" in caplog.text
