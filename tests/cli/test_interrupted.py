"""A fit that was stopped goes on by the same command and ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from lit_unlearn import cli
from lit_unlearn.callbacks import preemption
from lit_unlearn.callbacks.preemption import SaveOnSignal
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.system.run_file import read_run
from lit_unlearn.system.signals import note_signal
from lit_unlearn.training.runs import Run

RUN = Path("logs/null_space/dog")


class Killed(BaseException):
    """Ends a fit without any of Lightning's tidying up."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_edit(folder / "checkpoints" / "last.ckpt").weights


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Has the next trainers call a function after so many steps, before anything else of that step."""

    def arrange(step: int, function: Callable[[], Any]) -> None:
        original = SaveOnSignal.on_train_batch_start

        def start(self: SaveOnSignal, trainer: L.Trainer, *args: Any) -> None:
            original(self, trainer, *args)
            if trainer.global_step == step:
                monkeypatch.setattr(SaveOnSignal, "on_train_batch_start", original)
                function()

        monkeypatch.setattr(SaveOnSignal, "on_train_batch_start", start)

    return arrange


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_the_same_command_goes_on(
    step: int, workplace: Path, finished: Path, recipe: Path, interrupted_at: Callable[..., None], capsys: Any
) -> None:
    # Two layers of two steps each: killed before the first checkpoint, in the first layer, between both, in the second.
    interrupted_at(step, kill)
    with pytest.raises(Killed):
        cli.main(["fit", "--config", str(recipe)])
    assert read_run(RUN / "version_0")["state"] == "running"
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert f"Going on with {RUN / 'version_0'}, which was interrupted" in capsys.readouterr().out
    assert read_run(RUN / "version_0")["state"] == "finished"
    assert [path.name for path in RUN.iterdir()] == ["version_0"]
    assert equal(weights(RUN / "version_0"), weights(finished / RUN / "version_0"))


@pytest.mark.parametrize(("step", "saved"), [(0, 1), (1, 2), (2, 3), (3, None)])
def test_a_signal_saves_at_the_end_of_the_step(
    step: int,
    saved: int | None,
    workplace: Path,
    finished: Path,
    recipe: Path,
    interrupted_at: Callable[..., None],
    capsys: Any,
) -> None:
    # A layer's last step is followed by its edit and its checkpoint, and the last layer's by the end.
    interrupted_at(step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert cli.main(["fit", "--config", str(recipe)]) == (0 if saved is None else cli.TOLD_TO_STOP)
    said = re.search(r"Told to stop: .*saved .* step (\d+)\.", capsys.readouterr().err)
    assert (said and int(said[1])) == saved
    assert read_run(RUN / "version_0")["state"] == ("finished" if saved is None else "running")
    if saved is None:
        return
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert read_run(RUN / "version_0")["state"] == "finished"
    assert equal(weights(RUN / "version_0"), weights(finished / RUN / "version_0"))


@pytest.mark.parametrize(
    ("args", "saved"),
    [
        (["--data.init_args.steps", "1"], 1),  # each step is the last one of its layer
        (["--trainer.accumulate_grad_batches", "2", "--data.init_args.steps", "4"], 1),  # the second batch's end
    ],
)
def test_a_signal_finds_its_moment_whatever_an_epoch_is_made_of(
    args: list[str], saved: int, workplace: Path, recipe: Path, interrupted_at: Callable[..., None], capsys: Any
) -> None:
    assert cli.main(["fit", "--config", str(recipe), *args, "--method", "whole"]) == 0
    interrupted_at(0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert cli.main(["fit", "--config", str(recipe), *args]) == cli.TOLD_TO_STOP
    assert re.search(rf"Told to stop: .*saved .* step {saved}\.", capsys.readouterr().err)
    assert cli.main(["fit", "--config", str(recipe), *args]) == 0
    assert equal(weights(RUN / "version_0"), weights(Path("logs/whole/dog/version_0")))


def test_a_test_that_is_told_to_stop_is_requeued_and_leaves_no_scores(
    workplace: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    jobs: list[str] = []
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "slurm_job", lambda: "12")
        patch.setattr(preemption, "requeue", jobs.append)
        patch.setattr(SaveOnSignal, "on_test_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        assert cli.main(["test", "--config", str(recipe)]) == cli.TOLD_TO_STOP
    assert jobs == ["12"]
    assert "Told to stop: the test has not written scores." in capsys.readouterr().err
    assert not (RUN / "version_0/scores.json").exists()
    assert cli.main(["test", "--config", str(recipe)]) == 0


def test_a_signal_during_start_up_is_not_lost(workplace: Path, recipe: Path, capsys: Any) -> None:
    note_signal("SIGUSR1")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert cli.main(["fit", "--config", str(recipe)]) == cli.TOLD_TO_STOP
    assert "at step 1." in capsys.readouterr().err


def test_the_job_is_requeued_after_it_was_saved(
    workplace: Path, recipe: Path, interrupted_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[bool] = []

    def scontrol(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "requeue", "12_3"]
        saved.append((RUN / "version_0/checkpoints/last.ckpt").is_file())
        return subprocess.CompletedProcess(command, 0, "", "")

    interrupted_at(0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    # Set only now: Lightning looks for a job when it starts.
    interrupted = preemption.slurm_job
    monkeypatch.setattr(preemption, "slurm_job", lambda: "12_3")
    monkeypatch.setattr(preemption.subprocess, "run", scontrol)
    assert cli.main(["fit", "--config", str(recipe)]) == cli.TOLD_TO_STOP
    assert saved == [True]
    for environment, expected in (
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "5_2"),
        ({"SLURM_JOB_ID": "7; rm"}, None),
        ({}, None),
    ):
        for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert interrupted() == expected


def test_fresh_starts_anew_and_once_does_nothing_again(
    workplace: Path, recipe: Path, interrupted_at: Callable[..., None], capsys: Any
) -> None:
    interrupted_at(1, kill)
    with pytest.raises(Killed):
        cli.main(["fit", "--config", str(recipe)])
    assert cli.main(["fit", "--config", str(recipe), "--fresh"]) == 0
    assert read_run(RUN / "version_1")["state"] == "finished"
    assert read_run(RUN / "version_0")["state"] == "running"
    before = (RUN / "version_1/checkpoints/last.ckpt").stat().st_mtime_ns
    assert cli.main(["fit", "--config", str(recipe), "--once"]) == 0
    assert "version_1 is finished: nothing to do (--once)." in capsys.readouterr().out
    assert (RUN / "version_1/checkpoints/last.ckpt").stat().st_mtime_ns == before
    # Another configuration is another run, whatever lies there.
    assert cli.main(["fit", "--config", str(recipe), "--model.init_args.rounds", "2"]) == 0
    assert read_run(RUN / "version_2")["state"] == "finished"


def test_the_same_command_twice_at_once_is_refused(workplace: Path, recipe: Path, capsys: Any) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    Path("slow.yaml").write_text(
        yaml.safe_dump({**content, "data": {"class_path": "ConceptPrompts", "init_args": {"steps": 400}}}),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "lit_unlearn", "fit", "--config", "slow.yaml"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            while not (RUN / "version_0/run.json").is_file():
                assert first.poll() is None
                time.sleep(0.05)
            first.send_signal(signal.SIGSTOP)  # it shall not be done before this process asks, however busy the machine
            assert cli.main(["fit", "--config", "slow.yaml"]) == 2
        finally:
            first.kill()
    assert "version_0 is being written by process" in capsys.readouterr().err
    assert [path.name for path in RUN.iterdir()] == ["version_0"]


def test_a_run_that_is_named_is_locked_as_well(workplace: Path, recipe: Path, capsys: Any) -> None:
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    run = Run(RUN / "version_0", "another")
    run.claim()
    longer = ["fit", "--config", str(recipe), "--ckpt_path", "last", "--model.init_args.rounds", "2"]
    assert cli.main(longer) == 2
    assert "version_0 is being written by process" in capsys.readouterr().err
    run.release()
    assert cli.main(longer) == 0
