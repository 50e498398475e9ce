"""What a model that ``export`` has written says about its edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lit_unlearn.system.json_files import read_json

PROVENANCE = "lit_unlearn."
"""Beginning of the names of our entries in the metadata of a single file."""
NAMES = ("edited_weights", "concepts", "method", "clip_skip")
"""What is read of them."""


def provenance_of(place: Path | str) -> dict[str, Any]:
    """What a model says about its edit; empty for models that ``export`` has not written.

    Args:
        place: Its folder, or its single file, whose header holds the provenance; or a hub id.
    """
    try:
        if Path(place).is_file():
            with safe_open(place, framework="pt") as file:
                metadata = file.metadata() or {}
            found = {name: json.loads(metadata[PROVENANCE + name]) for name in NAMES if PROVENANCE + name in metadata}
        else:
            found = read_json(Path(place, "provenance.json"), "export it again")
    except (OSError, ValueError, SafetensorError):
        return {}
    return found if isinstance(found, dict) and "edited_weights" in found else {}


def recorded_clip_skip(place: Path | str) -> int | None:
    """The clip skip that a model was edited with, as its export says; None for none, and for other models."""
    found = provenance_of(place).get("clip_skip")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


__all__ = ["PROVENANCE", "provenance_of", "recorded_clip_skip"]
