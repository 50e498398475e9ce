"""A disk that is full, a folder that cannot be written to, a cache that is gone: one sentence, earlier results intact.

The disk is real: a file system in memory, which only root can mount. ``tests/evaluation/test_files.py`` does with a
disk that pretends.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import files
from lit_unlearn import cli
from lit_unlearn.edits.checkpoint import read_edit

KB = 1024
RUN = "logs/null_space/dog/version_0"
FULL = "No space left on device"


class Disk:
    """A file system of eight megabytes at ``folder``, of which a file takes as much as is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def leave(self, kilobytes: int) -> None:
        """Fill all but so much of it, to the nearest page."""
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4 * KB))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(file.tell() - kilobytes * KB)

    def free(self) -> None:
        self.filler.unlink()

    def contents(self) -> dict[str, bytes]:
        """All files but the filler and what TensorBoard appends to."""
        names = {name for name in files(self.folder) if name != "filler" and "tfevents" not in name}
        return {name: (self.folder / name).read_bytes() for name in names}

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("a file system can be mounted by root on Linux only")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2 and one sentence, which it returns."""

    def run(*args: Any) -> str:
        capsys.readouterr()
        assert cli.main([str(arg) for arg in args]) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("lit-unlearn: error: ")]
        assert err.splitlines()[-1] == line
        return line.removeprefix("lit-unlearn: error: ")

    return run


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]


# --- fit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "what"), [(0, "run.json"), (12, ""), (100, "checkpoints/last.ckpt"), (400, "checkpoints/last.ckpt")]
)
def test_a_fit_goes_on_when_there_is_space_again(
    left: int, what: str, disk: Disk, workplace: Path, finished: Path, recipe: Path, fails: Callable[..., str]
) -> None:
    # Full from the beginning; in the logs; at the first checkpoint, of 280 kB; at the second, beside the first.
    args = ["--config", recipe, "--trainer.default_root_dir", disk.folder / "logs"]
    disk.leave(left)
    message = fails("fit", *args)
    assert message.startswith(f"Could not write {disk.folder / RUN / what}")
    assert FULL in message
    assert message.endswith("; free some space, then run the same command again.")
    assert temporary(disk.folder) == []
    last = disk.folder / RUN / "checkpoints/last.ckpt"
    assert last.is_file() == (left == 400)
    if left == 400:
        assert "(what was there is unchanged)" in message
        assert read_edit(last).weights
    disk.free()
    assert cli.main([str(arg) for arg in ["fit", *args]]) == 0
    assert [path.name for path in last.parents[2].iterdir()] == ["version_0"]
    expected = read_edit(finished / RUN / "checkpoints/last.ckpt").weights
    found = read_edit(last).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# --- test, attack, export of a run that is finished


@pytest.fixture
def run_on_disk(disk: Disk, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run, below the disk, where the commands run."""
    shutil.copytree(finished / "logs", disk.folder / "logs")
    monkeypatch.chdir(disk.folder)
    return Path(RUN)


@pytest.mark.slow
def test_scores_survive_a_test_on_a_full_disk(
    run_on_disk: Path, disk: Disk, recipe: Path, fails: Callable[..., str]
) -> None:
    args = ["test", "--config", str(recipe), "--trainer.callbacks+=UneditedPictures"]
    disk.leave(0)
    message = fails(*args)
    assert message.startswith(f"Could not write {RUN}") and FULL in message
    disk.leave(64)  # the cache of the unedited model's pictures fills it up
    message = fails(*args)
    assert message.startswith("Could not write logs/unedited/") and f".png: {FULL}" in message
    assert not (run_on_disk / "scores.json").exists()
    disk.free()
    assert cli.main(args) == 0
    before = disk.contents()
    assert {f"{RUN}/scores.json", f"{RUN}/grid.png"} <= before.keys()
    disk.leave(8)  # now another test would replace what is there
    message = fails(*args, "--overwrite")
    assert message.startswith(f"Could not write {RUN}") and FULL in message
    assert {name: content for name, content in disk.contents().items() if "config_test" not in name} == {
        name: content for name, content in before.items() if "config_test" not in name
    }
    assert temporary(disk.folder) == []


@pytest.mark.slow
def test_attacks_survive_another_on_a_full_disk(
    run_on_disk: Path, disk: Disk, judge: str, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk.folder)  # the judge has a workplace of its own
    args = ["attack", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt", "--judge", judge, "--steps", "1"]
    args += ["--num_pictures", "1", "--attacks"]
    assert cli.main([*args, "ring_a_bell"]) == 0
    before = disk.contents()
    assert f"{RUN}/attacks.json" in before
    disk.leave(0)
    message = fails(*args, "relearning")
    assert message.startswith(f"Could not write {RUN}/attacks") and FULL in message
    assert disk.contents() == before
    assert temporary(disk.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--delta"], ["--lora", "auto"], []], ids=["delta", "lora", "pipeline"])
def test_an_export_survives_another_on_a_full_disk(
    kind: list[str], disk: Disk, finished: Path, workplace: Path, fails: Callable[..., str]
) -> None:
    output = disk.folder / "out"
    args = ["export", "--ckpt_path", str(finished / RUN / "checkpoints/last.ckpt"), "--output", str(output), *kind]
    assert cli.main(args) == 0
    before = disk.contents()
    # The pipeline's writers fail one after the other: the VAE, the text encoder, the tokenizer, the UNet, provenance.
    size = sum(len(content) for content in before.values()) // KB
    for left in [0] if kind else sorted({*range(0, size, size // 8), *(16, 32, 48)}):
        disk.leave(left)
        message = fails(*args, "--overwrite")
        assert message.startswith(f"Could not write {output}"), left
        assert f": {FULL} (what was there is unchanged); free some space" in message
        assert disk.contents() == before
        assert temporary(disk.folder) == []
    disk.free()
    assert cli.main([*args, "--overwrite"]) == 0


# --- folders that cannot be written to


@pytest.mark.slow
def test_a_disk_that_is_read_only(run_on_disk: Path, disk: Disk, recipe: Path, fails: Callable[..., str]) -> None:
    before = disk.contents()
    disk.read_only()
    reason = "Read-only file system; name a folder that you may write to."
    message = fails("fit", "--config", recipe)
    assert message == f"Could not write logs/null_space/dog/version_1: {reason}"
    message = fails("test", "--config", recipe)
    assert message == f"Could not write {RUN}: {reason}"
    message = fails("export", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt", "--output", "out")
    assert message == f"Could not write out: {reason}"
    assert disk.contents() == before


def test_a_file_where_a_folder_should_be(
    run_folder: Path, workplace: Path, recipe: Path, fails: Callable[..., str]
) -> None:
    Path("file").write_text("mine", encoding="utf-8")
    before, ckpt_path = files(workplace), run_folder / "checkpoints/last.ckpt"
    for form in ([], ["--delta"], ["--lora", "1"]):
        message = fails("export", "--ckpt_path", ckpt_path, "--output", "file/out", *form)
        assert message == "output='file/out': 'file' is a file where a folder should be, so name another folder."
    commands = [
        ["fit", "--config", recipe, "--trainer.default_root_dir", "file/logs"],
        ["generate", "a dog", "--ckpt_path", ckpt_path, "--output", "file/dog.png"],
    ]
    for command in commands:
        message = fails(*command)
        assert message.startswith("Could not write file/"), message
        assert message.endswith("a file stands where a folder should be, so name another folder."), message
    assert files(workplace) == before
    assert Path("file").read_text(encoding="utf-8") == "mine"
