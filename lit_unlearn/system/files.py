"""Files that are either old or new, never half written; all that replaces, renames or removes files is here.

Windows refuses to replace, rename or remove a file that is open or mapped into memory, and a folder that holds one.
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
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from lit_unlearn.system.names import LONGEST_PATH, on_windows

WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Numbers of the errors that come from writing only."""
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
"""Windows' own numbers of the errors by which it says that a file is in use; 5 may also mean that one may not write."""
PATIENCE, PAUSE = 10, 0.1
"""How often a file in use is tried, and seconds in between: virus scanners and indexers look into what is new."""


class WriteError(OSError):
    """A file or folder that could not be written: which, why, and what to do, in one sentence.

    Args:
        path: What was to be written, as the user knows it.
        error: Why it could not be.
        kept: Whether something stood there before, which is still what it was.
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError, kept: bool = False) -> None:
        remedy = _windows_remedy(path, error) or REMEDIES.get(error.errno or 0, "name another place")
        unchanged = " (what was there is unchanged)" if kept else ""
        self.path, self.error = Path(path), error
        super().__init__(error.errno, f"Could not write {path}: {error.strerror or error}{unchanged}; {remedy}.")

    def __str__(self) -> str:
        return str(self.strerror)


def _windows_remedy(path: str | os.PathLike[str], error: OSError) -> str | None:
    """What to do about an error that only Windows has."""
    if is_in_use(error):
        other = ", or name a folder that you may write to" if getattr(error, "winerror", None) == 5 else ""
        return f"close what has it open (an editor, a viewer, another run) and run the same command again{other}"
    longest = max(len(os.path.abspath(str(name))) for name in (path, error.filename or path))
    if on_windows() and longest > LONGEST_PATH:
        return f"its path has {longest} characters and Windows allows {LONGEST_PATH}, so name a folder nearer the top"
    return None


def is_in_use(error: OSError) -> bool:
    """Whether Windows has refused because a program, maybe this one, has the file open or mapped into memory."""
    return getattr(error, "winerror", None) in IN_USE


class _RawFile(io.FileIO):
    """A file that remembers why it could not be written: torch raises an error of its own, without the reason."""

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

    If the block or the replacement fails, the file that was there stays as it was and the temporary file is removed.
    Missing parent folders are made. A symbolic link is followed, not replaced.

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
        # Gone already when it replaced the target; absent when it could not even be opened.
        with contextlib.suppress(OSError):
            remove(temporary)


@contextlib.contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``output``; when the block ends it takes the place of ``output``, or nothing does.

    What a process that was killed has left beside ``output`` is removed, or put back where it was.

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
    """As ``replaced_folder``, for a folder that holds other things too: only what the block makes is replaced.

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


def copy_into(source: Path, folder: Path) -> None:
    """Copy what is in the folder ``source`` into ``folder``, over what has the same name there."""
    shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)  # not the files' modes


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f".{output.name}.{ending}")


def _take_place(new: Path, output: Path) -> None:
    """Put ``new`` in the place of ``output``; if that fails, ``output`` is what it was."""
    old = _beside(output, "old")
    if not output.is_dir():
        replace(new, output)
    else:
        remove_if_possible(old)  # of a process that was killed
        replace(output, old)
        try:
            replace(new, output)
        except OSError:
            replace(old, output)
            raise
    remove_if_possible(old)


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, in place of a file that is there; what is in use on Windows is waited for."""
    _patiently(os.replace, source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is in use on Windows is waited for."""
    if path.is_dir() and not path.is_symlink():
        _patiently(shutil.rmtree, path)
    elif path.exists() or path.is_symlink():
        _patiently(os.unlink, path)


def remove_if_possible(path: Path) -> None:
    """As ``remove``; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        remove(path)


def _patiently(function: Callable[..., Any], *paths: Path) -> None:
    for attempt in range(1, PATIENCE + 1):
        try:
            return function(*paths)
        except OSError as error:
            if attempt == PATIENCE or not is_in_use(error):
                raise
        gc.collect()  # objects of this process that are waiting for it may have the file open or mapped
        time.sleep(PAUSE)


def flush(folder: Path) -> None:
    """Have all files below ``folder`` written to the disk itself: a rename must not come before what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:  # Windows does it only for those that are open for writing
                os.fsync(file.fileno())


@contextlib.contextmanager
def naming(
    path: str | os.PathLike[str],
    kept: bool = False,
    only: Collection[int] | None = None,
    inside: Path | None = None,
) -> Iterator[None]:
    """Name ``path`` where a library that writes into it fails, most without saying which file.

    Args:
        path: What the block writes, as the user knows it.
        kept: Whether something stood there before, which is still what it was.
        only: Numbers of the errors that can come from writing, if the block does more than that; None: all.
        inside: A temporary folder, which the user does not know: what fails in it has the name ``path`` too.

    Raises:
        WriteError: Writing failed.
    """
    try:
        yield
    except Exception as error:  # libraries in Rust raise exceptions of no particular class
        reason = os_error(error)
        if isinstance(reason, WriteError) and inside is not None and reason.path.is_relative_to(inside):
            reason = reason.error
        if reason is None or isinstance(reason, WriteError) or (only is not None and reason.errno not in only):
            raise
        raise WriteError(path, reason, kept) from error


def os_error(error: BaseException) -> OSError | None:
    """The ``OSError`` that ``error`` is, or of which it says the number as libraries in Rust do; None if neither."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
        if on_windows():  # its own numbers
            return ctypes.WinError(number)  # type: ignore[attr-defined]
        return OSError(number, os.strerror(number))
    return None
