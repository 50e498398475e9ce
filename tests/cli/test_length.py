"""A fit that ends before its last step is not called finished; one that is finished goes on when it is made longer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_unlearn import cli
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.system.run_file import read_run

ESD = Path("logs/esd/dog")


@pytest.fixture(scope="session")
def esd(recipe: Path) -> str:
    """An epoch of two steps of ESD on a tiny pipeline."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del content["edit"]
    arguments = content["model"]["init_args"] | {"num_chain_steps": 3, "chains": 2, "num_inference_steps": 1}
    arguments["optimizer"]["init_args"]["lr"] = 1e-3
    content |= {"method": "esd", "model": {"class_path": "ESD", "init_args": arguments}}
    content["trainer"] |= {"max_epochs": 1, "callbacks": []}
    content["data"]["init_args"]["batch_size"] = 1
    path = recipe.parent / "length.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def two_steps(esd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("two_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["fit", "--config", esd]) == 0
    return folder


@pytest.fixture
def done(two_steps: Path, workplace: Path) -> Path:
    """Its run, below the folder to work in."""
    shutil.copytree(two_steps / "logs", "logs")
    return ESD / "version_0"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_edit(run / "checkpoints/last.ckpt").weights


def steps(run: Path) -> int:
    return int(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(
    "longer",
    [
        ["--data.steps=4"],
        ["--trainer.max_epochs=2"],
        ["--trainer.max_epochs=-1", "--trainer.max_steps=4"],
        ["--data.steps=3", "--trainer.max_epochs=2", "--trainer.max_steps=4"],
    ],
)
def test_a_finished_fit_that_is_made_longer_ends_as_one_of_that_length(done: Path, esd: str, longer: list[str]) -> None:
    before = weights(done)
    assert cli.main(["fit", "--config", esd, "--ckpt_path", "last", *longer]) == 0
    assert steps(done) == 4
    assert cli.main(["fit", "--config", esd, *longer, "--fresh"]) == 0
    whole, gone_on = weights(ESD / "version_1"), weights(done)
    assert steps(ESD / "version_1") == 4
    for name, value in whole.items():
        assert torch.equal(gone_on[name], value), name
    assert any(not torch.equal(before[name], value) for name, value in gone_on.items())
    assert read_run(done)["state"] == read_run(ESD / "version_1")["state"]


def test_a_finished_fit_of_the_same_length_says_so(done: Path, esd: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = done / "checkpoints/last.ckpt"
    before = file.read_bytes()
    assert cli.main(["fit", "--config", esd, "--ckpt_path", "last"]) == 0
    assert f"{file} is at its end after 2 steps, so there is nothing more to do: raise" in capsys.readouterr().out
    assert cli.main(["fit", "--config", esd, "--ckpt_path", "last", "--data.steps=1"]) == 2
    assert "there is nothing more to do: raise data.steps" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert read_run(done)["state"] == "finished"


def test_a_closed_form_has_its_own_length(run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", str(recipe), "--ckpt_path", "last", "--data.steps=5"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is at its end after 4 steps, so there is nothing more to do: raise model.rounds to go on" in said
    assert read_run(run_folder)["state"] == "finished"


def test_a_schedule_that_has_ended_is_said(done: Path, esd: str, capsys: pytest.CaptureFixture[str]) -> None:
    cycle = ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr=0.01"]
    args = ["fit", "--config", esd, *cycle, "--model.lr_scheduler.total_steps=2"]
    assert cli.main(args) == 0
    assert cli.main([*args, "--ckpt_path", "last", "--data.steps=4"]) == 2
    assert "the schedule of its learning rate ends at step 2" in capsys.readouterr().err


EARLY = ["--trainer.max_epochs=2", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=train/loss"]
EARLY += ["--trainer.callbacks.stopping_threshold=1e9", "--trainer.callbacks.check_on_train_epoch_end=true"]


@pytest.mark.parametrize(
    ("options", "ended"),
    [
        (["--data.steps=4", "--trainer.max_steps=1"], "after 1 of 4 steps, by trainer.max_steps=1"),
        (EARLY, "after 2 of 4 steps, by EarlyStopping on train/loss"),
    ],
)
def test_a_fit_that_ends_before_its_last_step_is_not_finished(
    workplace: Path, esd: str, options: list[str], ended: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--config", esd, *options]) == 0
    run = ESD / "version_0"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lit-unlearn: warning: {run} is not finished: the fit ended {ended}; ")
    assert (read_run(run)["state"], read_run(run)["stopped"]) == ("stopped", ended)
    assert cli.main(["export", "--ckpt_path", str(run / "checkpoints/last.ckpt"), "-o", "early"]) == 0
    assert f"{run} is not finished: it ended {ended}; its edit is that of the last" in capsys.readouterr().err
    # It ended as it was told to, so that the same command has nothing to do, and a longer one goes on.
    assert cli.main(["fit", "--config", esd, *options, "--once"]) == 0
    assert f"ended {ended}: nothing to do" in capsys.readouterr().out
    if options is not EARLY:  # Lightning would warn of the callback that is gone
        assert cli.main(["fit", "--config", esd, "--data.steps=4", "--ckpt_path", "last"]) == 0
        assert (read_run(run)["state"], steps(run)) == ("finished", 4)


def test_a_fit_that_ends_before_its_last_layer_is_not_finished(
    workplace: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--config", str(recipe), "--trainer.max_steps=1"]) == 0
    run: dict[str, Any] = read_run(Path("logs/null_space/dog/version_0"))
    assert (run["state"], run["stopped"]) == ("stopped", "after 1 of 4 steps, by trainer.max_steps=1")
    assert cli.main(["fit", "--config", str(recipe), "--ckpt_path", "last"]) == 2
    assert "cannot go on: it ended in the middle of a layer" in capsys.readouterr().err
