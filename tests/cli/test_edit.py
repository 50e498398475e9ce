"""The key ``edit`` from the command line into the checkpoint, the run and the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import metadata
from lit_unlearn import cli
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

SETTINGS = {"threshold": 0.1, "rule": "mean", "minimum": 4, "ridge": 1.0, "ridge_rule": "absolute"}
SETTINGS |= {"forget_unused": False, "tolerance": None}
"""Those of the recipe, with the defaults of what it does not say."""


def edit_of(path: str = "logs/null_space/dog/version_0") -> dict[str, Any]:
    """The solver that a run's checkpoint names."""
    return torch.load(Path(path, "checkpoints/last.ckpt"), weights_only=True)[CHECKPOINT_KEY]["edit"]


def test_the_checkpoint_and_the_export_say_how_the_weights_were_solved_for(run_folder: Path) -> None:
    expected = {"class_path": "NullSpace", "init_args": SETTINGS}
    path = run_folder / "checkpoints/last.ckpt"
    assert edit_of(str(run_folder)) == read_edit(path).edit == expected
    assert cli.main(["export", "--ckpt_path", str(path), "--delta", "--output", "delta"]) == 0
    assert json.loads(metadata("delta/delta.safetensors")["edit"]) == expected
    assert read_edit("delta/delta.safetensors").edit == expected
    assert cli.main(["export", "--ckpt_path", str(path), "--output", "whole"]) == 0
    assert json.loads(Path("whole/provenance.json").read_text(encoding="utf-8"))["edit"] == expected


def test_an_option_arrives_in_the_checkpoint_wherever_it_stands(workplace: Path, recipe: Path) -> None:
    quick = ["--trainer.callbacks", "[]", "--data.init_args.steps", "1"]
    assert cli.main(["fit", "--edit.threshold", "0.02", "--config", str(recipe), *quick]) == 0
    assert edit_of() == {"class_path": "NullSpace", "init_args": {**SETTINGS, "threshold": 0.02}}
    # The same fit, which is known by its configuration.
    assert cli.main(["fit", "--config", str(recipe), *quick, "--edit.threshold", "0.02", "--once"]) == 0
    assert [path.name for path in Path("logs/null_space/dog").iterdir()] == ["version_0"]
    # Another one.
    assert cli.main(["fit", "--config", str(recipe), *quick, "--edit.threshold", "0.03", "--once"]) == 0
    assert edit_of("logs/null_space/dog/version_1")["init_args"]["threshold"] == 0.03


def test_a_test_may_draw_with_compiled_kernels_and_says_so(
    run_folder: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(forward.__qualname__)
        return forward

    monkeypatch.setattr(torch, "compile", compile_nothing)
    given = ["test", "--config", str(recipe), "--ckpt_path", str(run_folder / "checkpoints/last.ckpt")]
    assert cli.main(given) == 0
    assert json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))["drawn"]["compiled"] is False
    assert compiled == []
    assert cli.main([*given, "--model.torch_compile", "true", "--overwrite"]) == 0
    assert json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))["drawn"]["compiled"] is True
    assert compiled == ["UNet2DConditionModel.forward", "Decoder.forward"]


def test_another_solver_takes_the_place_of_the_recipes(workplace: Path, recipe: Path) -> None:
    quick = ["--trainer.callbacks", "[]", "--data.init_args.steps", "1"]
    assert cli.main(["fit", "--config", str(recipe), *quick, "--edit", "RidgeMap", "--edit.lamb", "30"]) == 0
    assert edit_of() == {
        "class_path": "RidgeMap",
        "init_args": {"erase_scale": 1.0, "preserve_scale": 1.0, "lamb": 30.0},
    }


def test_a_test_is_of_the_solver_of_the_checkpoint(run_folder: Path, recipe: Path) -> None:
    assert (
        cli.main(["predict", "--config", str(recipe), "--edit.threshold", "0.7", "--trainer.limit_predict_batches=1"])
        == 0
    )
    config = yaml.safe_load((run_folder / "config_predict.yaml").read_text(encoding="utf-8"))
    assert config["edit"]["class_path"].endswith("NullSpace")
    assert config["edit"]["init_args"] == SETTINGS


def test_a_recipe_without_an_edit_is_refused(refuses: Callable[..., str], recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del content["edit"]
    Path("none.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    said = refuses("fit", "--config", "none.yaml")
    assert said.startswith("fit: ValueRefinement finds what to write, and nothing in the recipe writes it: add the key")


def test_an_edit_of_a_method_that_trains_is_refused(refuses: Callable[..., str]) -> None:
    said = refuses("fit", "--config", "esd.yaml", "--edit", "NullSpace")
    assert said == "fit: edit has no effect on ESD, which trains its weights: leave it out."


def test_an_old_recipe_is_refused_with_its_new_form(refuses: Callable[..., str], recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    callback = {"class_path": "NullSpaceEdit", "init_args": content.pop("edit")["init_args"]}
    content["trainer"]["callbacks"].insert(0, callback)
    Path("old.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert refuses("fit", "--config", "old.yaml") == (
        "The recipe old.yaml is of an earlier version: take NullSpaceEdit out of trainer.callbacks, and write "
        "`edit: {class_path: NullSpace, init_args: {minimum: 4, threshold: 0.1}}` instead."
    )


def test_a_solver_that_the_method_cannot_feed_is_one_sentence(
    workplace: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--trainer.callbacks", "[]", "--data.init_args.steps", "1", "--edit", "RefinedNullSpace"]
    assert cli.main(["fit", "--config", str(recipe), *args]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "RefinedNullSpace needs each retained key and the anchors' keys" in said


def test_help_lists_what_a_solver_can_be_told(workplace: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lit_unlearn", "fit", "--edit.help", "NullSpace"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert all(f"--edit.{name}" in result.stdout for name in SETTINGS)
