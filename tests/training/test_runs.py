"""Who writes into a run's folder, and which run a command that was interrupted goes on with."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_unlearn.system.errors import UserError
from lit_unlearn.system.files import WriteError
from lit_unlearn.training.runs import FINISHED, RUNNING, Run, config_sha256, newest_run, read_run

CONFIG = {
    "model": {"class_path": "ESD", "init_args": {"eta": 1.0}},
    "seed_everything": 0,
    "trainer": {"max_epochs": 3, "devices": 1, "accelerator": "cpu", "enable_progress_bar": True},
}


def test_the_hash_is_that_of_what_determines_the_result() -> None:
    same = {**CONFIG, "trainer": {**CONFIG["trainer"], "devices": 2, "enable_progress_bar": False}, "ckpt_path": "x"}  # type: ignore[dict-item]
    longer = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_epochs": 4}}  # type: ignore[dict-item]
    other = {**CONFIG, "model": {"class_path": "ESD", "init_args": {"eta": 2.0}}}
    assert config_sha256(same) == config_sha256(CONFIG)
    assert len({config_sha256(config) for config in (CONFIG, longer, other)}) == 3


def test_a_run_says_whether_it_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path / "version_0", "abc")
    assert read_run(run.folder) == {}
    run.claim()
    assert read_run(run.folder)["state"] == RUNNING
    assert read_run(run.folder)["config_sha256"] == "abc"
    run.finish()
    assert read_run(run.folder)["state"] == FINISHED
    run.release()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    code = f"""
import sys
from pathlib import Path
from lit_unlearn.training.runs import Run
run = Run(Path({str(folder)!r}), "abc")
run.claim()
print("claimed", flush=True)
sys.stdin.read()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "claimed\n"
    with pytest.raises(UserError, match=rf"version_0 is being written by process {first.pid}: wait until it ends"):
        Run(folder, "abc").claim()
    first.kill()
    first.wait()
    first.stdout.close()
    assert first.stdin is not None
    first.stdin.close()
    run = Run(folder, "abc")
    run.claim()  # the system let go of it when the process was killed
    assert read_run(folder)["process"] == f"process {os.getpid()}"
    run.release()


def test_a_folder_that_cannot_be_claimed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, old = Run(tmp_path / "version_1", "abc"), Run(tmp_path / "version_0", "abc")
    old.claim()
    old.release()
    before = (old.folder / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for each in (run, old):
            with pytest.raises(WriteError, match=rf"Could not write {each.folder}/run.json: No space left"):
                each.claim()
    assert os.listdir(tmp_path) == ["version_0"]  # not the one that was new
    assert (old.folder / "run.json").read_bytes() == before
    for each in (run, old):
        each.claim()
        each.release()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match=r"Could not write \S+/file/version_0: .*; a file stands where"):
        Run(tmp_path / "file/version_0", "abc").claim()


def test_the_newest_run_of_a_configuration(tmp_path: Path) -> None:
    for number, sha256 in ((0, "a"), (2, "a"), (10, "b"), (9, "a")):
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"state": RUNNING, "config_sha256": sha256}), encoding="utf-8")
    (tmp_path / "version_11").mkdir()
    (tmp_path / "version_12").mkdir()
    (tmp_path / "version_12" / "run.json").write_text("{torn", encoding="utf-8")
    (tmp_path / "version_x").mkdir()
    assert newest_run(tmp_path, "a") == tmp_path / "version_9"
    assert newest_run(tmp_path, "b") == tmp_path / "version_10"
    assert newest_run(tmp_path, "c") is None
    assert newest_run(tmp_path / "none", "a") is None
