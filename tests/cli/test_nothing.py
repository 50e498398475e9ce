"""An edit that changes nothing is not called an edit: not by a fit, not by an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import files
from lit_unlearn import cli
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.training.runs import FINISHED, read_run


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1].removeprefix("lit-unlearn: error: ")


def test_a_fit_that_changes_nothing_is_not_finished(
    recipe: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # So large a ridge that the change is lost when it is rounded.
    changes = ["--model.values", "target", "--edit.ridge", "1e30"]
    assert cli.main(["fit", "--config", str(recipe), *changes]) == 2
    assert said(capsys).startswith("fit: the edit changes nothing: after 4 steps all 2 edited weights are those of ")
    assert read_run(Path("logs/null_space/dog/version_0"))["state"] != FINISHED


@pytest.mark.parametrize(
    "command",
    [["export", "-o", "out"], ["export", "--delta", "-o", "out"], ["generate", "a dog", "-o", "out.png"], ["attack"]],
)
def test_what_changes_nothing_is_not_passed_on(
    command: list[str], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "checkpoints" / "last.ckpt"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    model = checkpoint[CHECKPOINT_KEY]["model"]
    from lit_unlearn.diffusion.load import load_pipeline

    unedited = load_pipeline(model).named_parameters()
    for name in checkpoint[CHECKPOINT_KEY]["edited_names"]:
        checkpoint["state_dict"][name] = unedited[name].detach()
    torch.save(checkpoint, path)
    before = files(Path())
    assert cli.main([*command, "--ckpt_path", str(path)]) == 2
    assert said(capsys) == (
        f"{path} changes nothing: all 2 weights that it edits are those of {model!r} bit for bit, so fit again with a "
        "larger edit."
    )
    assert files(Path()) == before
