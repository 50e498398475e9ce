"""Files that are either old or new, never half written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
        OSError: The file cannot be written, e.g. no space left or no permission; the message names ``path``.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkstemp: it makes files that only their owner can read, whatever the umask.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        kept = " The file that was there is unchanged." if target.is_file() else ""
        raise OSError(error.errno, f"Could not write {path}: {error.strerror or error}.{kept}") from error
    finally:
        # Gone already when it replaced the target; absent when it could not even be opened.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
