"""Writes files so that they are either old or new, never half written; also replaces, renames and removes files.

Windows refuses to replace, rename or remove a file that is open or mapped into memory, or a folder that holds one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from lit_unlearn.system.names import LONGEST_PATH, on_windows

WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Numbers of errors that only writing can cause."""
REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space or ask for more, then run the same command again",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or name another disk",
    errno.EROFS: "name a folder that you may write to",
    errno.EACCES: "name a folder that you may write to",
    errno.EPERM: "name a folder that you may write to",
    errno.ENOTDIR: "a file stands where a folder should be, so name another folder",
    errno.EEXIST: "a file stands where a folder should be, so name another folder",
}
IN_USE = {5, 32, 33, 1224}
"""Error numbers of Windows for a file that is in use; 5 can also mean that writing is not permitted."""
PATIENCE, PAUSE = 10, 0.1
"""Number of attempts for a file in use, and seconds between them, since virus scanners and indexers open new files."""
_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""The folders of ``folder_of_the_process``."""


class WriteError(OSError):
    """A file or folder could not be written; one sentence says which, why, and what to do.

    Args:
        path: The file or folder, by the user's name for it.
        error: The reason.
        kept: Whether an older version exists, which is unchanged.
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError, kept: bool = False) -> None:
        remedy = _windows_remedy(path, error) or REMEDIES.get(error.errno or 0, "name another place")
        unchanged = " (what was there is unchanged)" if kept else ""
        self.path, self.error = Path(path), error
        super().__init__(error.errno, f"Could not write {path}: {error.strerror or error}{unchanged}; {remedy}.")

    def __str__(self) -> str:
        return str(self.strerror)


def _windows_remedy(path: str | os.PathLike[str], error: OSError) -> str | None:
    """Advice for an error that only Windows has."""
    if is_in_use(error):
        other = ", or name a folder that you may write to" if getattr(error, "winerror", None) == 5 else ""
        return f"close what has it open (an editor, a viewer, another run) and run the same command again{other}"
    longest = max(len(os.path.abspath(str(name))) for name in (path, error.filename or path))
    if on_windows() and longest > LONGEST_PATH:
        return f"its path has {longest} characters and Windows allows {LONGEST_PATH}, so name a folder nearer the top"
    return None


def is_in_use(error: OSError) -> bool:
    """Whether Windows has refused since a program, maybe this one, has the file open or mapped into memory."""
    return getattr(error, "winerror", None) in IN_USE


class _RawFile(io.FileIO):
    """A file that remembers why it could not be written, since torch raises its own error without the reason."""

    error: OSError | None = None

    def write(self, content: object) -> int:
        try:
            return super().write(content)  # type: ignore[arg-type]
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; when the block ends it replaces ``path`` in one step.

    If the block or the replacement fails, an existing file stays unchanged and the temporary file is removed. Missing
    parent folders are made. A symbolic link is followed, not replaced.

    Args:
        path: The file to write.

    Yields:
        A binary file, open for writing.

    Raises:
        WriteError: The file cannot be written, e.g. no space left or no permission; the message names ``path``.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    raw = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkstemp: it makes files that only their owner can read, whatever the umask.
        raw = _RawFile(temporary, "xb")
        with io.BufferedWriter(raw) as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, target)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else raw.error if raw is not None else None
        if reason is None or isinstance(reason, WriteError):
            raise
        raise WriteError(path, reason, kept=target.is_file()) from error
    finally:
        # It is missing if it has replaced the target or could not be opened.
        with contextlib.suppress(OSError):
            remove(temporary)


@contextlib.contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``output``; when the block ends without an error, it replaces ``output``.

    Folders that a killed process has left beside ``output`` are removed, or moved back to their place.

    Raises:
        WriteError: A file cannot be written; the message names the output.
    """
    temporary, old = _beside(output, "tmp"), _beside(output, "old")
    with naming(output, kept=output.exists() or old.exists()):
        if old.exists() and not output.exists():
            replace(old, output)
        for left in (temporary, old):
            if left.exists():
                remove(left)
    try:
        with naming(output, kept=output.exists(), inside=temporary):
            temporary.mkdir(parents=True)
            yield temporary
            flush(temporary)
            _take_place(temporary, output)
    finally:
        remove_if_possible(temporary)


@contextlib.contextmanager
def replaced_entries(output: Path) -> Iterator[Path]:
    """As ``replaced_folder``, for a folder with other contents too: only files that the block makes are replaced.

    Raises:
        WriteError: A file cannot be written; the message names the output.
    """
    temporary = _beside(output, "tmp")
    try:
        with naming(output, kept=output.exists(), inside=temporary):
            remove_if_possible(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            flush(temporary)
            output.mkdir(exist_ok=True)
            for entry in sorted(temporary.iterdir()):
                _take_place(entry, output / entry.name)
    finally:
        remove_if_possible(temporary)


def folder_of_the_process() -> Path:
    """A new folder for temporary files, which is removed when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="lit-unlearn-", ignore_cleanup_errors=True)
    _KEPT.append(made)
    return Path(made.name)


def copy_into(source: Path, folder: Path) -> None:
    """Copy what is in the folder ``source`` into ``folder``, over what has the same name there."""
    shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)  # not the files' modes


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f".{output.name}.{ending}")


def _take_place(new: Path, output: Path) -> None:
    """Replace ``output`` by ``new``; if that fails, ``output`` is unchanged."""
    old = _beside(output, "old")
    if not output.is_dir():
        replace(new, output)
    else:
        remove_if_possible(old)  # left by a killed process
        replace(output, old)
        try:
            replace(new, output)
        except OSError:
            replace(old, output)
            raise
    remove_if_possible(old)


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, replacing a file there; on Windows, wait for files in use."""
    _patiently(os.replace, source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; on Windows, wait for files in use."""
    if path.is_dir() and not path.is_symlink():
        _patiently(shutil.rmtree, path)
    elif path.exists() or path.is_symlink():
        _patiently(os.unlink, path)


def remove_if_possible(path: Path) -> None:
    """As ``remove``, but files that cannot be removed are left without an error."""
    with contextlib.suppress(OSError):
        remove(path)


def _patiently(function: Callable[..., Any], *paths: Path) -> None:
    for attempt in range(1, PATIENCE + 1):
        try:
            return function(*paths)
        except OSError as error:
            if attempt == PATIENCE or not is_in_use(error):
                raise
        gc.collect()  # uncollected objects of this process may have the file open or mapped
        time.sleep(PAUSE)


def flush(folder: Path) -> None:
    """Write all files below ``folder`` to the disk itself, so that a later rename cannot reach the disk first."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:  # Windows needs them open for writing
                os.fsync(file.fileno())


@contextlib.contextmanager
def naming(
    path: str | os.PathLike[str],
    kept: bool = False,
    only: Collection[int] | None = None,
    inside: Path | None = None,
) -> Iterator[None]:
    """Name ``path`` in the error if a library cannot write it, since most libraries do not name the file.

    Args:
        path: File or folder that the block writes, by the user's name for it.
        kept: Whether an older version exists, which is unchanged.
        only: Numbers of the errors that can come from writing, if the block does more than writing; None: all.
        inside: A temporary folder that the user does not know; errors about files in it also name ``path``.

    Raises:
        WriteError: Writing failed.
    """
    try:
        yield
    except Exception as error:  # libraries in Rust do not raise OSError
        reason = os_error(error)
        if isinstance(reason, WriteError) and inside is not None and reason.path.is_relative_to(inside):
            reason = reason.error
        if reason is None or isinstance(reason, WriteError) or (only is not None and reason.errno not in only):
            raise
        raise WriteError(path, reason, kept) from error


def os_error(error: BaseException) -> OSError | None:
    """Return ``error`` if it is an ``OSError``, or one with the number in its message, as from Rust; otherwise None."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
        if on_windows():  # Windows has its own numbers
            return ctypes.WinError(number)  # type: ignore[attr-defined]
        return OSError(number, os.strerror(number))
    return None
