"""``RUN/run.json``: whether the fit of a run is finished, and what ended one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
RUNNING, STOPPED, FINISHED = "running", "stopped", "finished"


def read_run(folder: Path) -> dict[str, Any]:
    """Content of ``run.json`` in ``folder``; empty if the file is missing or cannot be read."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unfinished(folder: Path) -> str | None:
    """``is not finished: it ended after 2 of 4 steps, ...`` if the fit of the run ``folder`` is not; None if it is."""
    found = read_run(folder)
    if found.get("state") not in (RUNNING, STOPPED):
        return None
    return f"is not finished: it ended {found['stopped']}" if "stopped" in found else "is not finished"
