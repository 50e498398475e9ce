"""Every recipe of data unlearning takes two steps on each kind of pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.training import cli as training
from lit_unlearn.training.recipes import find_recipe

NAMES = ("siss", "two_pass", "bernoulli", "erase_diff", "neg_grad", "naive_deletion")
QUIET = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary", "logger")]
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[]",
    "--data.init_args.steps=2",
    "--data.init_args.batch_size=3",
    "--data.init_args.held_out=null",
]


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name in NAMES for model in ("tiny_sd", "tiny_sd2")] + [("siss", "emoji-sd")]
)
def test_a_recipe_takes_two_steps(
    name: str,
    model: str,
    keep_forget: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = model if model == "emoji-sd" else str(request.getfixturevalue(model))
    recipe = find_recipe(f"{name}.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    folders = [f"--data.init_args.{field}={path}" for field, path in keep_forget.items()]
    args = ["fit", "--config", str(recipe), f"--model.init_args.model={folder}", *folders, *SMALL, *QUIET]
    cli = training.run(args)
    assert isinstance(cli.model, DataUnlearning)
    assert cli.trainer.global_step == 2
    assert cli.model.pretrained.change_ratio() > 0
    parameters = cli.model.pipeline.named_parameters()
    assert all(torch.isfinite(parameters[name]).all() for name in cli.model.edited_names)
