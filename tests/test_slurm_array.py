"""Which recipes a task of the job array lays over one another; nothing is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import CONFIGS
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.training.classes import known_classes, prepare

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """Environment in which ``srun`` prints what it would run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"srun": 'shift; echo "$@"', "lit-unlearn": f'exec "{sys.executable}" -m lit_unlearn "$@"'}
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    package = str(CONFIGS.parent)
    return {**os.environ, "PATH": path, "PYTHONPATH": package, "CONCEPTS": "VanGogh", "SEEDS": "3"}


def cell(commands: dict[str, str], method: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**commands, "METHODS": method, "SLURM_ARRAY_TASK_ID": "0", **more}
    script = str(CONFIGS / "slurm" / "array.sbatch")
    return subprocess.run(
        ["bash", script, "--data.eval_batch_size", "2"],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        cwd=commands["PATH"].partition(os.pathsep)[0],
    )


def overlays(line: str) -> list[str]:
    return [word.removeprefix("--config=") for word in line.split() if word.startswith("--config=")]


def descends(method: str) -> bool:
    prepare()
    content = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text(encoding="utf-8"))
    return issubclass(known_classes()[content["model"]["class_path"]], GradientEditor)


AUTHORS = ("esd_2023", "esd_2025")
"""Recipes with the numbers of a code for Stable Diffusion, which docs/esd.md lays nothing but sd14.yaml over."""


@pytest.mark.parametrize(
    "method",
    sorted(
        path.stem for path in CONFIGS.glob("*.yaml") if path.stem.split("_")[0] not in ("sd14", "sdxl", "sd35", "flux")
    ),
)
def test_a_method_that_descends_has_an_overlay_of_its_own_or_is_refused(commands: dict[str, str], method: str) -> None:
    result = cell(commands, method)
    own = f"sd14_{method.removesuffix('_paper')}.yaml"
    if (CONFIGS / own).is_file():
        expected = ["sd14.yaml", own]
    elif descends(method) and method not in AUTHORS:
        assert result.returncode == 2
        assert result.stderr.startswith(
            f"There is no overlay {own}, and the settings of {method}.yaml are for the embedded"
        )
        return
    else:
        expected = ["sd14.yaml"]
    assert result.returncode == 0, result.stderr
    fit, test = result.stdout.splitlines()
    assert overlays(fit) == overlays(test) == expected
    assert f"--config {method}.yaml " in fit and fit.endswith("--once --data.eval_batch_size 2")


def test_another_model_has_overlays_of_its_own(commands: dict[str, str]) -> None:
    assert overlays(cell(commands, "esd", OVERLAY="").stdout.splitlines()[0]) == []
    here = Path(commands["PATH"].partition(os.pathsep)[0], "configs")
    here.mkdir()
    (here / "mine.yaml").write_text("method: x", encoding="utf-8")
    assert "There is no overlay mine_esd.yaml" in cell(commands, "esd", OVERLAY="mine.yaml").stderr
    (here / "mine_esd.yaml").write_text("method: x", encoding="utf-8")
    assert overlays(cell(commands, "esd", OVERLAY="mine").stdout.splitlines()[0]) == ["mine.yaml", "mine_esd.yaml"]


def test_a_recipe_is_named_with_or_without_its_ending_and_must_exist(commands: dict[str, str]) -> None:
    assert overlays(cell(commands, "esd.yaml").stdout.splitlines()[0]) == ["sd14.yaml", "sd14_esd.yaml"]
    unknown = cell(commands, "uce_20244")
    assert unknown.returncode == 2 and unknown.stdout == ""
    assert unknown.stderr.startswith("There is no recipe uce_20244.yaml, which METHODS names")
