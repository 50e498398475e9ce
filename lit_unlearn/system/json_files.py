"""JSON files: written in one step, read with clear error messages, and checked against types."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lit_unlearn.system.files import atomic_write


def read_json(path: Path, origin: str) -> Any:
    """Read JSON.

    Args:
        path: The file.
        origin: How the file is made, for the message if it is missing.

    Raises:
        ValueError: The file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}; {origin}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # covers broken JSON and broken UTF-8
        raise ValueError(f"{path} is not JSON ({error}); was it cut short or edited by hand?") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step: readers see the old file or the new one, and a failure leaves the old one.

    Args:
        path: The file to write.
        content: Dictionaries, lists, numbers, texts, dataclasses, paths, tensors and arrays. Numbers that are not
            finite become null, since JSON cannot express them.

    Raises:
        OSError: The file cannot be written; the message names it.
        TypeError: ``content`` has a value that JSON cannot express.
    """
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def plain(content: Any) -> Any:
    """Convert content for JSON: nan and infinity to None, tuples, tensors and arrays to lists."""
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    if content is None or isinstance(content, str | int):
        return content
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if is_dataclass(content):
        return {f.name: plain(getattr(content, f.name)) for f in fields(content)}
    if isinstance(content, os.PathLike):
        return os.fspath(content)
    if hasattr(content, "tolist"):
        return plain(content.tolist())
    raise TypeError(f"{content!r} of type {type(content).__name__} cannot be written as JSON.")


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Convert a value from JSON to the type ``hint``.

    Args:
        hint: A type, a dataclass, or a list, tuple, dict or optional of them.
        value: Value from JSON.
        where: Name of the value for messages; names of its fields are added to it.

    Raises:
        ValueError: The value has another type; the message names the field.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # one type or None
        (some,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else read_value(some, value, where)
    expected: Any = {dict: dict, list: list, tuple: list}.get(origin, hint)
    if is_dataclass(hint):
        expected = dict
    elif hint is float:
        expected = (float, int)
    if hint is not Any and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{where} is {value!r}, expected {hint.__name__ if origin is None else hint}.")
    if is_dataclass(hint):
        return _read_dataclass(hint, value, where)
    if origin is dict:
        return {key: read_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        return [read_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        if len(value) != len(arguments):
            raise ValueError(f"{where} is {value!r}, expected {len(arguments)} values.")
        return tuple(read_value(argument, item, where) for argument, item in zip(arguments, value, strict=True))
    return value


def _read_dataclass(kind: Any, content: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}; its fields are {', '.join(known)}.")
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{where} lacks the field {missing[0]!r}.")
    hints = get_type_hints(kind)
    return kind(**{name: read_value(hints[name], value, f"{where}.{name}") for name, value in content.items()})
