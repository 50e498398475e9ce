"""Two processes on the CPU find what one finds with the same global batch: weights, pictures and scores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CONFIGS
from lit_unlearn.edits.checkpoint import read_edit

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
ON_CPU = ["--trainer.accelerator", "cpu"]

pytestmark = pytest.mark.slow


def command(subcommand: str, root: str, processes: int, args: list[str]) -> None:
    """Run a command as a person would, so that Lightning can start the second process by itself."""
    devices = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
    where = ["--trainer.default_root_dir", root]
    # One thread each: the order of a sum may depend on their number.
    result = subprocess.run(
        [sys.executable, "-m", "lit_unlearn", subcommand, *args, *QUIET, *ON_CPU, *devices, *where],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-3000:]


def difference(first: Path, second: Path) -> float:
    a, b = (read_edit(folder / "checkpoints/last.ckpt").weights for folder in (first, second))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def without_cost(path: Path) -> dict[str, Any]:
    """Scores without what depends on clocks, memory and the last bits of float32."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("cost", "edit", "drift")}


def pictures(folder: Path) -> dict[Path, np.ndarray]:
    root = folder / "pictures"
    return {path.relative_to(root): np.asarray(Image.open(path)).astype(int) for path in sorted(root.rglob("*.png"))}


def compare(args: list[str], method: str, unedited: Path, predict: bool = True) -> tuple[Path, Path]:
    """Fit, test and predict with one and with two processes, compare, and return both runs' folders."""
    for root, processes in (("one", 1), ("two", 2)):
        shutil.rmtree("logs", ignore_errors=True)  # caches: each makes its own
        for subcommand in ("fit", "test", "predict") if predict else ("fit", "test"):
            command(subcommand, root, processes, args)
    first, second = (Path(root, method, "dog", "version_0") for root in ("one", "two"))
    assert difference(first, second) < 1e-5
    with_base = read_edit(first / "checkpoints/last.ckpt").weights
    assert any(not torch.equal(value, with_base[name]) for name, value in base_weights(unedited, with_base).items())
    assert without_cost(first / "scores.json") == without_cost(second / "scores.json")
    grids = [np.asarray(Image.open(folder / "grid.png")).astype(int) for folder in (first, second)]
    assert grids[0].shape == grids[1].shape and abs(grids[0] - grids[1]).max() <= 1
    if not predict:
        return first, second
    drawn = pictures(first), pictures(second)
    assert drawn[0].keys() == drawn[1].keys() and len(drawn[0]) > 0
    # Weights that differ in the seventh digit may round a pixel to its neighbour.
    assert max(abs(drawn[0][name] - drawn[1][name]).max() for name in drawn[0]) <= 1
    return first, second


def base_weights(model: Path, edited: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from lit_unlearn.diffusion.load import load_pipeline

    parameters = load_pipeline(str(model)).named_parameters()
    return {name: parameters[name].detach() for name in edited}


def test_the_null_space_edit(workplace: Path, recipe: Path, tiny_sd: Path) -> None:
    # Fifteen pairs: one process has eight of them, the other seven.
    uneven = ["--model.init_args.positions", "content", "--model.init_args.pull", "0.1"]  # prompts of unequal length
    args = ["--config", str(recipe), "--trainer.callbacks+=SavePictures", *uneven]
    first, second = compare(args, "null_space", tiny_sd)
    reports = [json.loads((folder / "scores.json").read_text(encoding="utf-8"))["edit"] for folder in (first, second)]
    assert reports[0]["retained_state_drift"] == pytest.approx(reports[1]["retained_state_drift"], rel=1e-4)
    for name, layer in reports[0]["layers"].items():
        other = reports[1]["layers"][name]
        assert layer["null_space_dimension"] == other["null_space_dimension"]
        # Losses that are reported are means over the global batch.
        assert [layer["first_error"], layer["last_error"]] == pytest.approx(
            [other["first_error"], other["last_error"]], rel=1e-4
        )


GRADIENT_ARGS = ["--data.init_args.steps", "2", "--data.init_args.batch_size", "3", "--trainer.max_epochs", "2"]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("memit.yaml", []),
        ("null_space_unet.yaml", ["--data.init_args.steps", "2", "--model.init_args.rounds", "1"]),
        ("null_space_unet_ffn.yaml", ["--model.init_args.rounds", "1"]),
        # Ten latents are two chunks of a cache, one for each process.
        ("forget_me_not.yaml", [*GRADIENT_ARGS, "--model.init_args.num_images", "10"]),
    ],
)
def test_a_recipe(name: str, extra: list[str], workplace: Path, recipe: Path, tiny_sd: Path) -> None:
    judge = recipe.parent / "judge"
    args = ["--config", str(CONFIGS / name), "--model.init_args.model", str(tiny_sd), "--model.init_args.judge"]
    args += [str(judge), "--model.init_args.num_inference_steps", "2", "--data.init_args.images_per_prompt", "1"]
    # Without predict, which draws what test judges. Further methods: tests/devices/test_two_processes.py.
    args += ["--concept", "dog", *extra]
    first, second = compare(args, name.removesuffix(".yaml"), tiny_sd, predict=False)
    assert 0 <= difference(first, second) < 1e-5


def test_data_unlearning(workplace: Path, recipe: Path, tiny_sd: Path, keep_forget: dict[str, str]) -> None:
    values = {"model": str(tiny_sd), "judge": str(recipe.parent / "judge"), "num_inference_steps": "2"}
    data = {"held_out": "null", "steps": "2", "batch_size": "3", "images_per_prompt": "2", **keep_forget}
    args = ["--config", "siss.yaml"]
    args += [
        f"--{part}.init_args.{k}={v}" for part, v_of in (("model", values), ("data", data)) for k, v in v_of.items()
    ]
    for root, processes in (("one", 1), ("two", 2)):
        shutil.rmtree("logs", ignore_errors=True)
        for subcommand in ("fit", "test"):
            command(subcommand, root, processes, args)
    first, second = (Path(root, "siss", "version_0") for root in ("one", "two"))
    assert difference(first, second) < 1e-5
    found = [without_cost(folder / "memorisation.json") for folder in (first, second)]
    for content in found:
        for kind in ("before", "after"):  # distances of pictures that differ in the last bits of the weights
            for part in content[kind].values():
                part.pop("drift", None)
    assert found[0] == found[1]


class BreaksOne(L.Callback):
    """Makes V1 of one process of two not a number before the second step."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            module.values.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        # Fewer pairs than processes: one of them would have nothing to do.
        (["--data.init_args.batch_size", "1"], "data.batch_size=1 is less than the 2 processes"),
        (["--trainer.callbacks+=test_distributed.BreaksOne"], "The loss is nan at step 1"),
        (["--edit.threshold", "1e-300", "--edit.minimum", "0"], "is empty"),
    ],
)
def test_what_one_process_finds_stops_both(args: list[str], message: str, workplace: Path, recipe: Path) -> None:
    # Each would wait for the other for ever.
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = subprocess.run(
        [sys.executable, "-m", "lit_unlearn", "fit", "--config", str(recipe), *QUIET, *ON_CPU, *two, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:3]))},
        timeout=120,
        encoding="utf-8",
    )
    assert result.returncode != 0
    assert message in result.stderr
