"""What Windows refuses: another encoding than the one that text was written in, files in use that shall be replaced."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_unlearn import cli
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system import files
from lit_unlearn.system.files import WriteError, atomic_write, os_error, remove, replaced_folder
from lit_unlearn.system.run_file import read_run

RUN = Path("logs/null_space/dog/version_0")
SHOWN = "Δ σ"
"""Characters that neither ASCII nor cp1252 has, the encoding of Windows in western Europe."""

# ------------------------------------------------------------------------------------------------------------ encodings


def test_a_recipe_is_utf8_whatever_the_system_s_encoding(recipe: Path, workplace: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = content.pop("data")
    Path("data.yaml").write_text(f"# {SHOWN}\n" + yaml.safe_dump(data), encoding="utf-8")
    content = {**content, "method": "Pokémon", "data": "data.yaml"}
    Path("mine.yaml").write_text(f"# {SHOWN}\n" + yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "lit_unlearn", "fit", "--config", "mine.yaml", "--print_config"]
    # Neither Python's own mode for it nor its mending of the locale C.
    system = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(command, env=system, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    printed = yaml.safe_load(result.stdout.decode())
    assert printed["method"] == "Pokémon"
    assert printed["data"]["init_args"]["steps"] == data["init_args"]["steps"]


class Stream(io.TextIOWrapper):
    """Where a program of Windows prints to, a terminal or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def printed(self) -> bytes:
        self.flush()
        return self.buffer.getvalue().strip()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, rb"\u0394 \u03c3 " + "é".encode("cp1252")), (False, f"{SHOWN} é".encode())]
)
def test_a_character_that_the_terminal_does_not_have(
    terminal: bool, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Stream(terminal), Stream(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(cli, "overview", lambda: f"{SHOWN} é")
    assert cli.main([]) == 0
    assert out.printed() == shown
    assert cli.main([f"{SHOWN} é"]) == 2
    assert b"There is no command '" + shown in err.printed()


# --------------------------------------------------------------------------------------------------------- files in use

proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is open on Linux only")
_watching = threading.local()
REFUSED = "The process cannot access the file because it is being used by another process"


def held_files() -> dict[str, int]:
    """Files that this process has open or mapped, with the number of Windows' error."""
    held = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            held[os.readlink(f"/proc/self/fd/{entry}")] = 32
        except FileNotFoundError:  # that of the listing
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        held |= {line.split(maxsplit=5)[5].rstrip("\n"): 1224 for line in maps if len(line.split(maxsplit=5)) == 6}
    return {path: number for path, number in held.items() if not os.path.isdir(path)}


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook that fails what Windows would."""
    if not getattr(_watching, "on", False) or event not in ("os.rename", "os.remove", "open"):
        return
    if event == "open":
        path, _, flags = args
        # Python truncates a file that another has open, but none that is mapped.
        touched, numbers = ([(path, -1)] if isinstance(path, str) and flags & os.O_TRUNC else []), {1224}
    else:
        touched = [(args[0], args[-1])] if event == "os.remove" else [(args[0], args[2]), (args[1], args[3])]
        numbers = {32, 1224}
    _watching.on = False  # what it does itself is not looked at
    try:
        for path, folder in touched:
            start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
            place = os.path.realpath(os.path.join(start, os.fspath(path)))
            for name, number in held_files().items():
                if number in numbers and (name == place or name.startswith(f"{place}/")):
                    error = PermissionError(errno.EACCES, REFUSED, os.fspath(path))
                    error.winerror = number  # type: ignore[attr-defined]
                    raise error
    finally:
        _watching.on = True


_installed: list[bool] = []


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system that does not replace, rename or remove a file that this process has open or mapped."""
    if not _installed:
        sys.addaudithook(refuse)  # for good: Python has no way to take it back
        _installed.append(True)
    monkeypatch.setattr(files, "PAUSE", 0.0)
    _watching.on = True
    yield
    _watching.on = False


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


@proc
def test_a_file_in_use_is_named_and_stays(windows: None, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write(path, b"old")
    with path.open("rb"):
        with pytest.raises(WriteError) as caught:
            write(path, b"new")
        assert str(caught.value) == (
            f"Could not write {path}: {REFUSED} (what was there is unchanged); close what has it open (an editor, a "
            "viewer, another run) and run the same command again."
        )
        with pytest.raises(PermissionError):
            remove(path)
        with pytest.raises(PermissionError):
            remove(tmp_path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["scores.json"]
    write(path, b"new")
    assert path.read_bytes() == b"new"


@proc
def test_a_mapped_file_is_in_use_until_its_tensors_are_gone(windows: None, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    save_file({"weight": torch.arange(10_000.0)}, path)
    loaded = load_file(path)
    with pytest.raises(WriteError):
        write(path, b"new")
    with pytest.raises(PermissionError):
        path.write_bytes(b"new")
    assert loaded["weight"][-1] == 9999
    del loaded
    write(path, b"new")


@proc
def test_a_folder_with_a_file_in_use_stays(windows: None, tmp_path: Path) -> None:
    output = tmp_path / "export"
    for text in ("old", "new"):
        with replaced_folder(output) as folder:
            (folder / "file").write_text(text, encoding="utf-8")
    with (
        (output / "file").open("rb"),
        pytest.raises(WriteError, match="close what has it open"),
        replaced_folder(output) as folder,
    ):
        (folder / "file").write_text("newer", encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in output.iterdir()} == {"file": "new"}
    assert os.listdir(tmp_path) == ["export"]


@proc
def test_a_program_that_only_looks_in_is_waited_for(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", b"old")
    reader = (tmp_path / "file").open("rb")
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=lambda _: reader.close()))
    write(tmp_path / "file", b"new")
    assert reader.closed
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_is_written_to_the_disk_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    flushed = []

    def fsync(number: int) -> None:  # Windows refuses another one
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        flushed.append(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file", b"new")
    with replaced_folder(tmp_path / "export") as folder:
        (folder / "file").write_bytes(b"new")
    assert len(flushed) == 2


def test_a_path_longer_than_windows_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x" / ("y" * 200) / ("z" * 100)
    error = FileNotFoundError(errno.ENOENT, "The system cannot find the path specified", str(path))
    monkeypatch.setattr(files, "on_windows", lambda: True)
    assert f"its path has {len(str(path))} characters and Windows allows 259" in str(WriteError(path, error))
    assert "characters" not in str(WriteError(tmp_path, FileNotFoundError(errno.ENOENT, "No such file", "x")))


def test_libraries_in_rust_say_the_number_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "There is not enough space on the disk")
    monkeypatch.setattr(files, "on_windows", lambda: True)
    monkeypatch.setattr(files, "ctypes", SimpleNamespace(WinError={112: full}.__getitem__))
    assert os_error(Exception("I/O error: There is not enough space on the disk. (os error 112)")) is full


# ------------------------------------------------------------------------------------------------------- whole commands


def run(*args: str | Path) -> int:
    return cli.main([str(arg) for arg in args])


@proc
@pytest.mark.slow
def test_every_output_can_be_replaced(windows: None, recipe: Path, workplace: Path) -> None:
    ckpt_path = RUN / "checkpoints" / "last.ckpt"
    assert run("fit", "--config", recipe) == 0
    for replace in ([], ["--overwrite"]):
        assert run("test", "--config", recipe, *replace) == 0
        assert run("predict", "--config", recipe) == 0
        assert run("generate", "a dog", "-o", "dog.png", "--ckpt_path", ckpt_path, *replace) == 0
        assert run("export", "--ckpt_path", ckpt_path, "-o", "whole", *replace) == 0
        assert run("export", "--ckpt_path", ckpt_path, "-o", "old", "--names", "2022", *replace) == 0
        assert run("export", "--ckpt_path", ckpt_path, "-o", "part", "--delta", *replace) == 0
        assert run("export", "--ckpt_path", ckpt_path, "-o", "lora", "--lora", "auto", *replace) == 0
        assert run("report", "logs", *replace) == 0
        assert run("verify", "whole") == 0


@proc
def test_an_export_replaces_what_it_was_made_from(windows: None, recipe: Path, workplace: Path) -> None:
    ckpt_path = RUN / "checkpoints" / "last.ckpt"
    assert run("fit", "--config", recipe) == 0
    assert run("export", "--ckpt_path", ckpt_path, "-o", "part", "--delta") == 0
    before = load_file("part/delta.safetensors")
    before = {name: value.clone() for name, value in before.items()}
    model = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]["model"]
    delta = ["--ckpt_path", "part/delta.safetensors", "--model", model, "-o", "part", "--delta", "--overwrite"]
    assert run("export", *delta, "--dtype", "bfloat16") == 0
    assert {value.dtype for value in load_file("part/delta.safetensors").values()} == {torch.bfloat16}

    # The base of the edit is an earlier export: one may edit again and again, into the same folder.
    shutil.copytree(model, "base")
    Path("base/provenance.json").touch()
    assert run("export", "--ckpt_path", ckpt_path, "--model", "base", "-o", "base", "--overwrite") == 0
    assert run("verify", "base") == 0
    after = load_file("base/text_encoder/model.safetensors")
    assert all(torch.equal(after[name.removeprefix("text_encoder.")], before[name]) for name in before)


@proc
def test_a_fit_goes_on_and_one_that_edits_nothing_leaves_nothing(
    windows: None, recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionEditor, "on_fit_end", kill)
        with pytest.raises(Killed):
            run("fit", "--config", recipe)
    assert read_run(RUN)["state"] == "running"
    assert run("fit", "--config", recipe) == 0
    assert read_run(RUN)["state"] == "finished"

    nothing = ["--edit.threshold", "1e-30", "--edit.minimum", "0"]
    assert run("fit", "--config", recipe, *nothing, "--method", "nothing") == 2
    assert not list(Path("logs/nothing").rglob("version_*"))
