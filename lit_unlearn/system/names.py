"""Names of files and folders that every system can have: what is written on one is read on another."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import PureWindowsPath

LONGEST_LABEL, LONGEST_PATH = 100, 259
"""Most characters of a name that we make, and of a path on Windows, unless it is told to allow more."""
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", flags=re.IGNORECASE)
"""Names that stand for devices on Windows, whatever follows behind a dot."""


def on_windows() -> bool:
    """Whether this is Windows."""
    return sys.platform == "win32"


def file_name(label: str) -> str:
    """The name that ``label``, such as that of a concept, has as a file or a folder.

    Spaces become underscores. Where more than that has to change, a hash of the label keeps different labels apart:
    ``soccer_ball``, ``_aux-321f6814``.
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
    """The name of a folder for what belongs to all ``labels``: ``dog+cat``, ``dog+18_others-5f2ff0c4``."""
    name = "+".join(file_name(label) for label in labels)
    if len(name) <= LONGEST_LABEL or len(labels) == 1:
        return name
    return f"{file_name(labels[0])[:60]}+{len(labels) - 1}_others-{_hash(*labels)}"


def why_not(name: str) -> str | None:
    """Why a file or a folder cannot be called ``name`` on Windows, as in ``holds ':'``; None if it can."""
    if found := re.search(r'[<>:"|?*/\\\x00-\x1f]', name):
        return f"holds {found[0]!r}"
    if name.endswith((".", " ")) and name not in (".", ".."):
        return f"ends with {name[-1]!r}"
    return "is the name of a device" if DEVICES.fullmatch(name) else None


def check_path(field: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path of the user's that this system cannot have; only Windows is particular.

    Args:
        field: What the path was given for, as the user knows it.
        path: The path.

    Raises:
        ValueError: Which part of it is wrong, and why.
    """
    if not on_windows():
        return
    given = PureWindowsPath(path)
    for part in given.parts[1:] if given.anchor else given.parts:
        if reason := why_not(part):
            raise ValueError(f"{field}={str(path)!r}: {part!r} {reason}, which Windows does not allow: rename it.")


def _hash(*labels: str) -> str:
    return hashlib.sha256("\0".join(labels).encode(errors="surrogatepass")).hexdigest()[:8]
