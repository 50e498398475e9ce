"""What an export says of the machine that it was made on: names of files and folders, never where they lie."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RUNS = "logs"
"""Our own folder: what lies below it is named by the recipe, and says nothing of the machine."""
MODEL_FIELDS = ("model", "_name_or_path", "backbone.name")
"""Ends of the names of what holds a model's name."""
END = r"""[^\s'"`,;:()<>]"""
"""A character of a path within a text."""
IN_TEXT = re.compile(rf"(?<![\w/.:~\\-])(?:~?/{END}+/{END}+|[A-Za-z]:[\\/]{END}+|\\\\{END}+)")
"""An absolute path within a text; one with spaces is only found where it is a text of its own elsewhere."""


TEXTS = (".json", ".md", ".txt", "")
"""Endings of files that are text."""
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
"""Files in which what looks like a path is a word."""


def is_place(text: str) -> bool:
    """Whether ``text`` as a whole is the path of a file or folder: absolute, by way of ``~`` or ``..``, or existing."""
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
    """The last part of a path, whichever system's."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "folder"


class Places:
    """Replaces places by names.

    Args:
        models: Public names of the base model, by what it is called here: its paths, and names relative to this folder.
    """

    def __init__(self, models: Mapping[str, str]) -> None:
        self._models = {text: name for text, name in models.items() if text != name}
        self._known = {text: name for text, name in self._models.items() if os.path.isabs(text)}
        self._home = os.path.expanduser("~")

    def learn(self, value: Any) -> None:
        """Remember the places in ``value``, so that they are found within other texts too."""
        for text in texts(value):
            if is_place(text) and text not in self._models:
                self._known.setdefault(text, name_of(text))

    def text(self, text: str) -> str:
        """``text`` with the name of each place instead of its path."""
        if is_place(text) or ("/" in text and text in self._models):
            return self._models.get(text) or self._known.get(text) or name_of(text)
        return IN_TEXT.sub(lambda found: name_of(found[0]), self.known(text))

    def known(self, text: str) -> str:
        """``text`` with names for the places that are known: the base model, the home folder, what was learned."""
        for known in sorted(self._known, key=len, reverse=True):
            text = _places(known).sub(lambda _, name=self._known[known]: name, text)  # type: ignore[misc]
        below = _places(self._home, rf"[/\\]{END}+").sub(lambda found: name_of(found[0]), text)
        return _places(self._home).sub("~", below)

    def without(self, value: Any, changed: list[str], where: str = "") -> Any:
        """A copy of ``value``, of mappings, lists and plain values, with names for places.

        Args:
            value: What is to be published.
            changed: Takes the dotted names of the values that are others now.
            where: Dotted name of ``value`` itself.
        """
        if isinstance(value, Mapping):
            return {k: self.without(v, changed, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.without(item, changed, f"{where}.{number}") for number, item in enumerate(value)]
        if not isinstance(value, str | os.PathLike):
            return value
        text = os.fspath(value)
        # a model's name may be a word such as "base", which is another thing elsewhere
        public = self._models.get(text) if where.endswith(MODEL_FIELDS) else None
        public = self.text(text) if public is None else public
        if public != text:
            changed.append(where)
        return public


def _places(path: str, rest: str = "") -> re.Pattern[str]:
    """Finds ``path`` within a text, but not as a part of a longer name; a whole disk is found nowhere."""
    return re.compile(rf"(?<![\w.~-]){re.escape(path)}{rest}(?![\w-])" if path.strip("/") else r"(?!)")


def texts(value: Any) -> Iterator[str]:
    """All texts in mappings and lists, keys aside."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str | os.PathLike):
        yield str(value)


def public_content(path: Path, name: str, places: Places) -> bytes | None:
    """What a file of an export is to hold instead of what it does; None if it names no place.

    Args:
        path: The file: text, or safetensors, in whose header there is text.
        name: Its name within the export.
        places: What to replace.
    """
    if path.suffix == ".safetensors":
        return _public_header(path, places)
    if PurePosixPath(name).suffix not in TEXTS or PurePosixPath(name).name in VOCABULARIES:
        return None
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:  # nothing that anyone reads
        return None
    if PurePosixPath(name).suffix == ".json":
        try:
            changed: list[str] = []
            public = places.without(json.loads(text), changed)
            return json.dumps(public, indent=2).encode() if changed else None
        except (ValueError, RecursionError):  # not JSON after all, but text
            pass
    public = places.known(text)
    return None if public == text else public.encode()


def without_any(path: Path) -> str | None:
    """A text file without any place or hash of a model's name, to be compared; None if it is not text.

    What was a place elsewhere cannot be known here: an export of the same base on two machines differs in that only.
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
