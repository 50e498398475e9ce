"""``lit-unlearn runs``: list runs and their scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_unlearn.commands.parser import Parser, command_parser
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.run_file import FINISHED, read_run

DESCRIPTION = "list runs with their state and scores"
SCORES = ("forget", "retain", "harmonic_mean")


def parser() -> Parser:
    """Options of ``runs``."""
    made = command_parser("runs", DESCRIPTION)
    made.add_argument("folders", nargs="*", default=["logs"], metavar="LOGS", help="folders to search; default: logs")
    made.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return made


def run(options: argparse.Namespace) -> None:
    """List the runs below some folders, one a line.

    Raises:
        UserError: A folder does not exist.
    """
    found = []
    for name in options.folders:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"runs: there is no folder {folder}: `lit-unlearn fit` writes logs.")
        found += list(runs_below(folder))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        print(f"no runs in {', '.join(options.folders)}")
        return
    _print(found)


def runs_below(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs below ``folder`` by their names: folder, state, and scores, which are None if it was not tested."""
    for file in sorted(folder.rglob("run.json")):
        scores = _scores(file.parent)
        yield {
            "folder": file.parent.as_posix(),
            "state": str(read_run(file.parent).get("state", "unknown")),
            "attacked": (file.parent / "attacks").is_dir() or (file.parent / "attacks.json").exists(),
            **{name: scores.get(name) for name in SCORES},
        }


def _scores(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _print(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "forget", "retain", "mean"):
        numeric = heading not in ("run", "state")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for one in found:
        state = one["state"] if one["state"] != FINISHED or one["forget"] is None else "tested"
        numbers = ["-" if not isinstance(one[name], int | float) else f"{one[name]:.2f}" for name in SCORES]
        table.add_row(one["folder"], state, *numbers)
    Console().print(table)
