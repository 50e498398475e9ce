"""Names of files and folders that are valid on every system, so that all systems can read the same files."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import PureWindowsPath

LONGEST_LABEL, LONGEST_PATH = 100, 259
"""Largest number of characters of a name that we make, and of a path on Windows by default."""
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", flags=re.IGNORECASE)
"""Names of devices on Windows, with or without an ending after a dot."""


def on_windows() -> bool:
    """Whether this is Windows."""
    return sys.platform == "win32"


def file_name(label: str) -> str:
    """Name of the file or folder for ``label``, such as the name of a concept.

    Spaces become underscores. If other characters have to change, a hash of the label is added, so that different
    labels get different names: ``soccer_ball``, ``_aux-321f6814``.
    """
    spaced = label.replace(" ", "_")
    name = re.sub(r"[^\w.-]|^\.", "_", spaced)
    if len(name) > LONGEST_LABEL or len(name.encode()) > 2 * LONGEST_LABEL:
        name = name[:80].encode()[: 2 * LONGEST_LABEL - 40].decode(errors="ignore")
    name = name.rstrip(".")
    if DEVICES.fullmatch(name):
        name = f"_{name}"
    return name if name and name == spaced else f"{name}-{_hash(label)}"


def joint_name(labels: Sequence[str]) -> str:
    """Name of the folder for all ``labels`` together: ``dog+cat``, ``dog+18_others-5f2ff0c4``."""
    name = "+".join(file_name(label) for label in labels)
    if len(name) <= LONGEST_LABEL or len(labels) == 1:
        return name
    return f"{file_name(labels[0])[:60]}+{len(labels) - 1}_others-{_hash(*labels)}"


def why_not(name: str) -> str | None:
    """Reason why Windows does not allow ``name`` for a file or a folder, such as ``holds ':'``; None if it does."""
    if found := re.search(r'[<>:"|?*/\\\x00-\x1f]', name):
        return f"holds {found[0]!r}"
    if name.endswith((".", " ")) and name not in (".", ".."):
        return f"ends with {name[-1]!r}"
    return "is the name of a device" if DEVICES.fullmatch(name) else None


def check_path(field: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path from the user that this system does not allow; only Windows has such restrictions.

    Args:
        field: The user's name of the option that the path was given for.
        path: The path.

    Raises:
        ValueError: Windows does not allow the path; the message says which part, and why.
    """
    if not on_windows():
        return
    given = PureWindowsPath(path)
    for part in given.parts[1:] if given.anchor else given.parts:
        if reason := why_not(part):
            raise ValueError(f"{field}={str(path)!r}: {part!r} {reason}, which Windows does not allow: rename it.")


def _hash(*labels: str) -> str:
    return hashlib.sha256("\0".join(labels).encode(errors="surrogatepass")).hexdigest()[:8]
