"""Takes one edit out of several that lie on top of each other; ``undo`` and ``lit_unlearn.undo`` call this."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lit_unlearn.data.names import name_key
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.chain import Link, without
from lit_unlearn.edits.checkpoint import Edit, warn_unfinished
from lit_unlearn.edits.export import export_delta, output_path, provenance


def find_link(links: Sequence[Link], wanted: int | str) -> int:
    """The place of an edit, counted from 0.

    Args:
        links: The edits, the first one first.
        wanted: Its place, counted from 1, or a concept that it edited.

    Raises:
        ValueError: There is no such edit, or there are several.
    """
    there = "; ".join(f"{number} {link.title()}" for number, link in enumerate(links, 1))
    text = str(wanted)
    if text.isascii() and text.isdigit() and 1 <= int(text) <= len(links):
        return int(text) - 1
    found = [n for n, link in enumerate(links) if name_key(text) in map(name_key, link.concepts)]
    if len(found) == 1:
        return found[0]
    what = "is of several edits" if found else "is not there"
    raise ValueError(f"edit={wanted!r} {what}: give the number or a concept of one ({there}).")


def write_without(
    edit: Edit,
    number: int,
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    revision: str | None = None,
    config_folder: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, Edit]:
    """Write a delta of the edits without one of them.

    Args:
        edit: Edits on top of each other.
        number: The one to take out, counted from 0.
        output: The file, or a folder for ``delta.safetensors``.
        model: The base model; None for the one that was edited.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: Folder with what a single file does not hold, as for ``BaseModel.find``.
        overwrite: Replace an earlier export.

    Returns:
        The file, and what it holds.

    Raises:
        ValueError: The edit cannot be taken out, the model is another one, or the output exists.
        OSError: The output cannot be written.
    """
    path = output_path(Path(output).expanduser(), "delta.safetensors", overwrite)
    warn_unfinished(edit.path)
    base = chosen_base(model, revision, edit, config_folder)
    left = without(edit, number, base)
    facts = provenance(left, base)
    facts["scores"] = None  # those of the run are of all its edits
    export_delta(left, facts, path, None)
    return path, left
