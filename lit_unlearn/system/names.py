"""Names of files and folders that every system can have: what is written on one is read on another."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path, PureWindowsPath

LONGEST_LABEL, LONGEST_PATH = 100, 259
"""Most characters of a name that we make, and of a path on Windows, unless it is told to allow more."""
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", flags=re.IGNORECASE)
"""Names that stand for devices on Windows, whatever follows behind a dot."""


TEXT_SUFFIXES = {".txt", ".csv", ".tsv", ".yaml", ".yml", ".json", ".jsonl", ".md"}
FILE_SUFFIXES = TEXT_SUFFIXES | {
    ".safetensors",
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".pkl",
    ".onnx",
    ".npz",
    ".npy",
    ".gguf",
}
FILE_SUFFIXES |= {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".html", ".htm"}
FILE_SUFFIXES |= {".zip", ".tar", ".gz", ".tgz", ".7z", ".log", ".py", ".tex", ".xlsx", ".parquet"}
"""Endings of names that say that it is a file."""


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


def check_output_name(path: str | os.PathLike[str], suffixes: Collection[str], may_be_folder: bool) -> None:
    """Refuse an output that cannot be what its name says.

    Args:
        path: The output, as the user has named it.
        suffixes: Those of the files that the command can write, such as ``.png``.
        may_be_folder: Whether it can write a folder.

    Raises:
        ValueError: It is the name of another kind of file, or another kind of thing stands there.
    """
    given = Path(path)
    suffix, kinds = given.suffix.lower(), " or ".join(sorted(suffixes))
    if suffix in suffixes:
        if given.is_dir():
            raise ValueError(f"output={path} is a folder, but names a file: give another name.")
    elif not may_be_folder:
        raise ValueError(f"output={path} must end in {kinds}.")
    elif suffix in FILE_SUFFIXES:
        file = f", or a file that ends in {kinds}" if suffixes else ""
        raise ValueError(f"output={path} names a {suffix} file, but what is written is a folder{file}: name that.")
    elif given.is_file():
        raise ValueError(f"output={path} is a file, but what is written is a folder: give another name.")


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse a prompt that is a file of prompts.

    Raises:
        ValueError: Which one, and what to do.
    """
    for prompt in prompts:
        if Path(prompt).suffix.lower() in TEXT_SUFFIXES and os.path.isfile(prompt):
            raise ValueError(
                f"The prompt {prompt!r} is a file, which is not read: give the prompts that are in it, each in quotes."
            )


def _hash(*labels: str) -> str:
    return hashlib.sha256("\0".join(labels).encode(errors="surrogatepass")).hexdigest()[:8]
