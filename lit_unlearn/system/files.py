"""Files that are either old or new, never half written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, cast

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


class WriteError(OSError):
    """A file or folder that could not be written: which, why, and what to do, in one sentence.

    Args:
        path: What was to be written, as the user knows it.
        error: Why it could not be.
        kept: Whether something stood there before, which is still what it was.
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError, kept: bool = False) -> None:
        remedy = REMEDIES.get(error.errno or 0, "name another place")
        unchanged = " (what was there is unchanged)" if kept else ""
        super().__init__(error.errno, f"Could not write {path}: {error.strerror or error}{unchanged}; {remedy}.")

    def __str__(self) -> str:
        return str(self.strerror)


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
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else raw.error if raw is not None else None
        if reason is None or isinstance(reason, WriteError):
            raise
        raise WriteError(path, reason, kept=target.is_file()) from error
    finally:
        # Gone already when it replaced the target; absent when it could not even be opened.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
            old.rename(output)
        for left in (temporary, old):
            if left.exists():
                shutil.rmtree(left)
    try:
        with naming(output, kept=output.exists()):
            temporary.mkdir(parents=True)
            yield temporary
            flush(temporary)
            _take_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replaced_entries(output: Path) -> Iterator[Path]:
    """As ``replaced_folder``, for a folder that holds other things too: only what the block makes is replaced.

    Raises:
        WriteError: A file cannot be written; the message names the output.
    """
    temporary = _beside(output, "tmp")
    try:
        with naming(output, kept=output.exists()):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            flush(temporary)
            output.mkdir(exist_ok=True)
            for entry in sorted(temporary.iterdir()):
                _take_place(entry, output / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f".{output.name}.{ending}")


def _take_place(new: Path, output: Path) -> None:
    """Put ``new`` in the place of ``output``; if that fails, ``output`` is what it was."""
    old = _beside(output, "old")
    if not output.is_dir():
        new.replace(output)
    else:
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        output.rename(old)
        try:
            new.rename(output)
        except OSError:
            old.rename(output)
            raise
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Have all files below ``folder`` written to the disk itself: a rename must not come before what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], kept: bool = False, only: Collection[int] | None = None) -> Iterator[None]:
    """Name ``path`` where a library that writes into it fails, most without saying which file.

    Args:
        path: What the block writes, as the user knows it.
        kept: Whether something stood there before, which is still what it was.
        only: Numbers of the errors that can come from writing, if the block does more than that; None: all.

    Raises:
        WriteError: Writing failed.
    """
    try:
        yield
    except Exception as error:  # libraries in Rust raise exceptions of no particular class
        reason = os_error(error)
        if reason is None or isinstance(reason, WriteError) or (only is not None and reason.errno not in only):
            raise
        raise WriteError(path, reason, kept) from error


def os_error(error: BaseException) -> OSError | None:
    """The ``OSError`` that ``error`` is, or of which it says the number as libraries in Rust do; None if neither."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None
