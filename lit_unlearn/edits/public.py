"""Replaces paths of this machine in an export by the names of their files and folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RUNS = "logs"
"""The default folder of runs: paths below it come from the recipe and reveal nothing about the machine."""
MODEL_FIELDS = ("model", "_name_or_path", "backbone.name")
"""Last parts of the names of settings that contain a model's name."""
END = r"""[^\s'"`,;:()<>]"""
"""A character of a path within a text."""
IN_TEXT = re.compile(rf"(?<![\w/.:~\\-])(?:~?/{END}+/{END}+|[A-Za-z]:[\\/]{END}+|\\\\{END}+)")
"""An absolute path within a text; a path with spaces is found only if it is a whole value elsewhere."""


TEXTS = (".json", ".md", ".txt", "")
"""Endings of files that are text."""
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
"""Files in which text that looks like a path is a word."""


def is_place(text: str) -> bool:
    """Whether the whole ``text`` is the path of a file or folder: it is absolute, has ``~`` or ``..``, or exists."""
    if "\n" in text or "://" in text:
        return False
    windows = PureWindowsPath(text)
    if windows.drive and windows.root:
        return True
    parts = PurePosixPath(text).parts
    if parts[:1] == ("/",):
        return len(parts) > 2 or (len(parts) == 2 and os.path.exists(text))
    if len(parts) < 2:
        return False
    return parts[0].startswith("~") or ".." in parts or (parts[0] != RUNS and os.path.exists(text))


def name_of(place: str) -> str:
    """The last part of a path of any operating system."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "folder"


class Places:
    """Replaces paths by names.

    Args:
        models: The public name of the base model for each of its local names: absolute and relative paths.
    """

    def __init__(self, models: Mapping[str, str]) -> None:
        self._models = {text: name for text, name in models.items() if text != name}
        self._known = {text: name for text, name in self._models.items() if os.path.isabs(text)}
        self._home = os.path.expanduser("~")

    def learn(self, value: Any) -> None:
        """Remember the paths in ``value``, so that they are also found within other texts."""
        for text in texts(value):
            if is_place(text) and text not in self._models:
                self._known.setdefault(text, name_of(text))

    def text(self, text: str) -> str:
        """``text`` with every path replaced by its name."""
        if is_place(text) or ("/" in text and text in self._models):
            return self._models.get(text) or self._known.get(text) or name_of(text)
        return IN_TEXT.sub(lambda found: name_of(found[0]), self.known(text))

    def known(self, text: str) -> str:
        """``text`` with known paths replaced: the base model's, the home folder, and the paths from ``learn``."""
        for known in sorted(self._known, key=len, reverse=True):
            text = _places(known).sub(lambda _, name=self._known[known]: name, text)  # type: ignore[misc]
        below = _places(self._home, rf"[/\\]{END}+").sub(lambda found: name_of(found[0]), text)
        return _places(self._home).sub("~", below)

    def without(self, value: Any, changed: list[str], where: str = "") -> Any:
        """A copy of ``value`` (mappings, lists and plain values) with every path replaced by a name.

        Args:
            value: The value to publish.
            changed: The dotted names of changed values are appended to this list.
            where: Dotted name of ``value`` itself.
        """
        if isinstance(value, Mapping):
            return {k: self.without(v, changed, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.without(item, changed, f"{where}.{number}") for number, item in enumerate(value)]
        if not isinstance(value, str | os.PathLike):
            return value
        text = os.fspath(value)
        # a model's name may be a word such as "base", which means something else in other settings
        public = self._models.get(text) if where.endswith(MODEL_FIELDS) else None
        public = self.text(text) if public is None else public
        if public != text:
            changed.append(where)
        return public


def _places(path: str, rest: str = "") -> re.Pattern[str]:
    """A pattern that finds ``path`` within a text, but not within a longer name; the root of a disk never matches."""
    return re.compile(rf"(?<![\w.~-]){re.escape(path)}{rest}(?![\w-])" if path.strip("/") else r"(?!)")


def texts(value: Any) -> Iterator[str]:
    """All texts in mappings and lists, without the keys."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str | os.PathLike):
        yield str(value)


def public_content(path: Path, name: str, places: Places) -> bytes | None:
    """The content of a file of an export without paths; None if nothing has to be replaced.

    Args:
        path: The file: text, or safetensors, whose header is text.
        name: Its name within the export.
        places: The paths to replace.
    """
    if path.suffix == ".safetensors":
        return _public_header(path, places)
    if PurePosixPath(name).suffix not in TEXTS or PurePosixPath(name).name in VOCABULARIES:
        return None
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:  # not text
        return None
    if PurePosixPath(name).suffix == ".json":
        try:
            changed: list[str] = []
            public = places.without(json.loads(text), changed)
            return json.dumps(public, indent=2).encode() if changed else None
        except (ValueError, RecursionError):  # text, but not JSON
            pass
    public = places.known(text)
    return None if public == text else public.encode()


def without_any(path: Path) -> str | None:
    """A text file without paths and hashes of a model's name, for a comparison; None if it is not text.

    Exports of the same base on two machines may differ only in these, and paths of another machine are unknown here.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.dumps(Places({}).without(json.loads(text), []))
    except (ValueError, RecursionError):
        return None
    return re.sub(r"@[0-9a-f]{12}\b", "", Places({}).text(text))


def _public_header(path: Path, places: Places) -> bytes | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        changed: list[str] = []
        metadata = places.without(header.get("__metadata__") or {}, changed)
        if not changed:
            return None
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        text += b" " * (-len(text) % 8)  # the weights stay aligned
        return len(text).to_bytes(8, "little") + text + file.read()
