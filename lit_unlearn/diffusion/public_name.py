"""Public names of models: the hub id and commit, or the folder's name and a hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.source import SHIPPED, shipped_folder

SNAPSHOT = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)[/\\]?$")
"""End of a path in the hub's cache: the id, with ``--`` for ``/``, and the commit."""
LOCAL_NAME = re.compile(r"(.+)@[0-9a-f]{12}")
"""Form of the names that ``public_name`` gives to folders."""


def hub_snapshot(folder: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The hub id and commit of a folder in the hub's cache, or None if it lies elsewhere; the folder need not exist."""
    for path in (os.fspath(folder), os.path.abspath(folder), os.path.realpath(folder)):
        if found := SNAPSHOT.search(path):
            return found[1].replace("--", "/"), found[2]
    return None


def public_name(base: BaseModel, sha256: Mapping[str, str]) -> tuple[str, str | None]:
    """The name of a base model without paths of this machine, and its revision on the hub.

    Args:
        base: The model.
        sha256: Hashes of its parts, from ``BaseModel.sha256``.
    """
    if isinstance(base.place, str):
        return base.place, base.revision
    if found := hub_snapshot(base.place):
        return found
    place = Path(os.path.abspath(base.place))
    for name in SHIPPED:
        if (shipped := shipped_folder(name)) and place == Path(os.path.abspath(shipped)):
            return name, None
    digest = hashlib.sha256(json.dumps(dict(sha256), sort_keys=True).encode()).hexdigest()
    return f"{' '.join(place.name.split()) or 'model'}@{digest[:12]}", None
