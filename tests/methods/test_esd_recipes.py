"""Every recipe of ESD takes two steps on models of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import CONFIGS
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.training import cli as training

RECIPES = {
    "esd": ["esd.yaml"],
    "esd_2023": ["esd_2023.yaml"],
    "esd_2025": ["esd_2025.yaml"],
    "sd14_esd": ["esd.yaml", "sd14_esd.yaml"],
}


@pytest.mark.parametrize(
    ("recipe", "model"),
    [*((recipe, model) for recipe in RECIPES for model in ("tiny_sd", "tiny_sd2")), ("esd", "emoji-sd")],
)
def test_a_recipe_takes_two_steps(
    recipe: str, model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "emoji-sd" if model == "emoji-sd" else str(request.getfixturevalue(model))
    args = [word for name in RECIPES[recipe] for word in ("--config", str(CONFIGS / name))]
    args += ["--model.init_args.model", path, "--concept", "[dog, rain]", "--trainer.accelerator", "cpu"]
    args += ["--trainer.callbacks", "null", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    args += ["--trainer.enable_model_summary", "false", "--data.init_args.steps", "2"]
    args += ["--model.init_args.num_chain_steps", "2", "--model.init_args.chains", "1"]
    cli = training.run(["fit", *args])
    module = cli.model
    assert isinstance(module, ESD)
    assert cli.trainer.global_step == 2
    assert module.pretrained.change_ratio() > 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    (saved,) = tmp_path.glob("logs/*/dog+rain/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.edited_names)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["esd_2025"])
def test_two_processes_train_what_one_does(recipe: str, tiny_sd: Path, tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        args = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--model.init_args.model", str(tiny_sd)]
        args += ["--concept", "[dog, rain]", "--trainer.accelerator", "cpu", "--trainer.callbacks", "null"]
        args += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
        args += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path / str(processes))]
        args += ["--data.init_args.steps", "4", "--data.init_args.batch_size", "4"]
        # An odd number of chains, three refreshes, and an optimizer that does not blow rounding up as Adam's first does
        args += ["--model.init_args.num_chain_steps", "2", "--model.init_args.chains", "3"]
        args += ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.1"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "lit_unlearn", "fit", *args], check=True, env=env, timeout=300)
        (saved,) = (tmp_path / str(processes)).glob("*/dog+rain/version_0/checkpoints/last.ckpt")
        weights.append(read_edit(saved).weights)
    one, two = weights
    start = ConceptEditor(concept="dog", model=str(tiny_sd))
    start.configure_model()
    pretrained = start.pretrained.values
    assert one.keys() == two.keys() == pretrained.keys()
    moved = max(float((one[name] - pretrained[name]).abs().max()) for name in one)
    assert moved > 1e-4
    for name in one:
        # Sums in another order, relative to how far the training went
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3 * moved)
