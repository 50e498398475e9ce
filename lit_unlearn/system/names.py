"""Names of files and folders that are valid on every system, so that all systems can read the same files."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path, PureWindowsPath
from unicodedata import category

LONGEST_LABEL, LONGEST_PATH = 100, 259
"""Largest number of characters of a name that we make, and of a path on Windows by default."""
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", flags=re.IGNORECASE)
"""Names of devices on Windows, with or without an ending after a dot."""


TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction in which text is shown."""
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


def check_numbers(section: str = "", /, **numbers: int | None) -> None:
    """Refuse numbers below 1; those that are None are not given.

    Args:
        section: Section of the recipe that their fields are in, such as ``model``; empty if they are in none.
        **numbers: The numbers by their fields.

    Raises:
        ValueError: Which one.
    """
    for field, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{f'{section}.' if section else ''}{field}={value} must be at least 1.")


def is_text(value: object) -> bool:
    """Whether ``value`` is text with something in it, that UTF-8 can hold, and that leaves a terminal's lines alone."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any(category(one) in ("Cc", "Cs", "Zl", "Zp") or one in TURNS for one in value)
