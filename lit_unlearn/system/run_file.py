"""``RUN/run.json``: whether the fit of a run is finished, and what ended one that is not."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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


def checkpoint_of(given: str | os.PathLike[str]) -> Path:
    """The last checkpoint in the folder of a run, or the file that is given."""
    inside = Path(given, "checkpoints", "last.ckpt")
    return inside if inside.is_file() else Path(given)


def check_checkpoint(given: str | Path, option: str = "ckpt_path") -> None:
    """Refuse a checkpoint, delta or folder of a run that does not exist.

    Args:
        given: The path.
        option: Name of the option that it is given as, for the message.

    Raises:
        ValueError: There is no such file, or the folder has no checkpoint.
    """
    path = checkpoint_of(Path(given).expanduser())
    if path.is_dir():
        found = sorted(path.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
        runs = f"give the folder of a run, e.g. {found[-1].parents[1]}" if found else "it has no run"
        raise ValueError(f"{option}={path} is a folder without checkpoints/last.ckpt: {runs}.")
    if not path.is_file():
        writes = "export --delta" if path.suffix == ".safetensors" else "fit"
        what = "such a file" if path.suffix == ".safetensors" else "logs/.../checkpoints/last.ckpt"
        raise ValueError(f"{option}={path} does not exist: `lit-unlearn {writes}` writes {what}.")


def scores_files(folders: Sequence[str | Path]) -> list[Path]:
    """All ``scores.json`` in and below ``folders``; one may be named itself.

    Raises:
        ValueError: A folder does not exist, or contains no tested run.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"report: there is no folder {folder}.")
        paths = [folder] if folder.name == "scores.json" else sorted(folder.rglob("scores.json"))
        if not paths:
            raise ValueError(f"report: {folder} holds no scores.json; `lit-unlearn test` writes one into each run.")
        found += paths
    return found


def unfinished(folder: Path) -> str | None:
    """``is not finished: it ended after 2 of 4 steps, ...`` if the fit of the run ``folder`` is not; None if it is."""
    found = read_run(folder)
    if found.get("state") not in (RUNNING, STOPPED):
        return None
    return f"is not finished: it ended {found['stopped']}" if "stopped" in found else "is not finished"
