"""Who writes into a run's folder, and which run a command that was interrupted goes on with."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.files import WriteError
from lit_unlearn.system.names import LONGEST_LABEL
from lit_unlearn.system.run_file import FINISHED, RUNNING, read_run
from lit_unlearn.training.runs import Run, config_sha256, newest_edit, newest_run, run_name

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


def changed_set(folder: Path, name: str, anchor: str) -> ConceptSet:
    content = load_concept_set("emoji20").content() | {"name": name}
    content["concepts"]["owl"]["anchor"] = anchor
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_concept_set(path)


def test_two_concept_sets_never_share_a_folder(tmp_path: Path) -> None:
    shipped = load_concept_set("emoji20")
    anchor = shipped.concepts["owl"].anchor
    assert run_name("uce", ["dog", "soccer ball"], shipped) == "uce/dog+soccer_ball"
    assert run_name("uce", ["dog"], changed_set(tmp_path, "emoji20", anchor)) == "uce/dog"  # a copy
    sets = [
        changed_set(tmp_path, *of)
        for of in (("emoji20", "a bird."), ("mine", anchor), ("mine", "a bird."), ("a/b", anchor), ("x" * 200, anchor))
    ]
    labels = [run_name("uce", ["dog"], one) for one in [shipped, load_concept_set("paper20"), *sets]]
    assert len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"uce/dog@[\w.-]+-[0-9a-f]{8}", label) for label in labels[1:])
    assert labels[3].startswith("uce/dog@mine-")
    # Many concepts: in full as far as there is room, and told apart by all of them.
    many = list(load_concept_set("paper20").concepts)
    first, second = (
        run_name("uce", names, load_concept_set("paper20")) for names in (many[:-1], many[:-2] + many[-1:])
    )
    assert first != second and len(first) <= len("uce/") + LONGEST_LABEL


def test_an_edit_of_another_set_beside_is_named_where_there_is_none(tmp_path: Path) -> None:
    last = tmp_path / "uce" / "dog@pets-12345678" / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    with pytest.raises(UserError, match=r"test needs a run, and \S*uce/dog has none: run"):
        newest_edit(tmp_path / "uce" / "dog", "test", ["dog"])
    last.touch()
    with pytest.raises(UserError, match=r"dog has none \(\S*uce/dog@pets-12345678 is of another concept set\)"):
        newest_edit(tmp_path / "uce" / "dog", "test", ["dog"])
    assert newest_edit(last.parents[2], "test", ["dog"]) == last
