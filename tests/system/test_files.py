from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_unlearn.system.files import WRITING, WriteError, atomic_write, naming, replaced_entries, replaced_folder
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.pixels import save_png
from lit_unlearn.training.checkpoint_io import AtomicCheckpointIO


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def test_the_old_file_is_replaced_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "scores.json"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["scores.json"]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_no_space_left_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(WriteError) as caught:
                write(path, b"new")
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value) == (
            f"Could not write {path}: No space left on device (what was there is unchanged); free some space, then run "
            "the same command again."
        )
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("room", [0, 700, 90_000])
def test_a_file_that_cannot_grow_under_the_writer_of_a_library(room: int, tmp_path: Path) -> None:
    # The system refuses to write more than so many bytes: none, within the head of torch's archive, in the middle of
    # the numbers. Torch's own error says nothing of it.
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(2)}, path)
    picture = Image.effect_noise((400, 400), 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save in (
        lambda: AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, path),
        lambda: save_png(path, picture),
        lambda: write_json(path, list(range(100_000))),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(WriteError) as caught:
                save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert f"{path}: File too large (what was there is unchanged); raise the limit" in str(caught.value)
        assert os.listdir(tmp_path) == ["last.ckpt"]
        assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.zeros(2))


def test_an_error_that_is_not_the_disk_s_is_left_alone(tmp_path: Path) -> None:
    for error in (RuntimeError("of torch"), ValueError("of ours")):
        with pytest.raises(type(error), match=str(error)), atomic_write(tmp_path / "file"):
            raise error
        with pytest.raises(type(error), match=str(error)), naming(tmp_path / "file"):
            raise error
    with pytest.raises(FileNotFoundError), naming(tmp_path, only=WRITING):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space, then run the same command again"),
        (errno.EDQUOT, "free some space or ask for more, then run the same command again"),
        (errno.EROFS, "name a folder that you may write to"),
        (errno.EACCES, "name a folder that you may write to"),
        (errno.ENOTDIR, "a file stands where a folder should be, so name another folder"),
        (errno.EIO, "name another place"),
    ],
)
def test_libraries_in_rust_say_the_number_only(number: int, remedy: str, tmp_path: Path) -> None:
    reason = os.strerror(number)
    with pytest.raises(WriteError) as caught, naming(tmp_path / "out"):
        raise Exception(f"Error while serializing: I/O error: {reason} (os error {number})")
    assert caught.value.errno == number
    assert str(caught.value) == f"Could not write {tmp_path / 'out'}: {reason}; {remedy}."


def test_an_interrupted_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(OSError, match=r"Could not write .*scores.json"):
        write(tmp_path / "scores.json", b"new")
    (tmp_path / "log").write_bytes(b"a file, not a folder")
    with pytest.raises(OSError, match=r"Could not write .*log/scores.json"):
        write(tmp_path / "log" / "scores.json", b"new")
    assert sorted(os.listdir(tmp_path)) == ["log", "scores.json"]


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        write(tmp_path / "file", b"new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


# --- folders


def text_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_folder(output: Path, text: str) -> None:
    with replaced_folder(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text, encoding="utf-8")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = tmp_path / "above" / "export"
    write_folder(output, "first")
    (output / "more").write_text("by hand", encoding="utf-8")
    write_folder(output, "second")
    assert text_of(tmp_path) == {"above/export/inner/file": "second"}


@pytest.mark.parametrize("replaced", [replaced_folder, replaced_entries])
def test_the_name_of_a_temporary_folder_is_not_told(replaced: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(WriteError) as caught, replaced(output) as folder, atomic_write(folder / "facts.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value).startswith(f"Could not write {output}: No space left on device; free some space")


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "export"
    write_folder(output, "first")
    with pytest.raises(ZeroDivisionError), replaced_folder(output) as folder:
        (folder / "file").write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert text_of(tmp_path) == {"export/inner/file": "first"}


@pytest.mark.parametrize("moment", ["made", "moved away", "moved in"])
def test_what_a_killed_process_has_left_is_put_right(moment: str, tmp_path: Path) -> None:
    output, temporary, old = (tmp_path / name for name in ("export", ".export.tmp", ".export.old"))
    write_folder(output, "first")
    if moment == "made":
        temporary.mkdir()
        (temporary / "file").write_text("half", encoding="utf-8")
    else:
        output.rename(old)
        if moment == "moved in":
            (output / "inner").mkdir(parents=True)
            (output / "inner/file").write_text("killed", encoding="utf-8")
    # One that fails shows what is there by then: the old folder, or the new one if it was in its place already.
    with pytest.raises(ZeroDivisionError), replaced_folder(output):
        raise ZeroDivisionError
    assert text_of(tmp_path) == {"export/inner/file": "killed" if moment == "moved in" else "first"}
    write_folder(output, "second")
    assert text_of(tmp_path) == {"export/inner/file": "second"}


def test_entries_replace_only_their_own_names(tmp_path: Path) -> None:
    output = tmp_path / "model"
    for text in ("first", "second"):
        with replaced_entries(output) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / text).write_text(text, encoding="utf-8")
            (folder / "index.json").write_text(text, encoding="utf-8")
        (output / "LICENSE").write_text("of the model", encoding="utf-8")
    assert text_of(tmp_path) == {
        "model/unet/second": "second",
        "model/index.json": "second",
        "model/LICENSE": "of the model",
    }
    with pytest.raises(ZeroDivisionError), replaced_entries(output) as folder:
        (folder / "index.json").write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert text_of(tmp_path)["model/index.json"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
