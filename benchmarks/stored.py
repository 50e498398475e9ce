"""Benches of many results: each is stored as soon as it is there, so that a bench goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Protocol

Make = Callable[[Any, Path], dict[str, Any]]
"""From a cell and the folder of the bench to the cell's result; a function of a module."""


class Keyed(Protocol):
    """What one result is of."""

    @property
    def key(self) -> str:
        """Name of the result; ``/`` between its parts."""


def add_options(parser: argparse.ArgumentParser, root: str, results: str) -> None:
    """Add the options of every bench; ``root`` and ``results`` are defaults."""
    parser.add_argument("--root", default=root, help="folder of edits and results")
    parser.add_argument("--results", default=results, help="file that all results are joined into")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    parser.add_argument("--summary_only", action="store_true", help="do not run anything, only write the tables")


def make_stored(
    arguments: argparse.Namespace, cells: Sequence[Keyed], make: Make, tables: Callable[[Any], str], title: str
) -> None:
    """Make the results that are missing, join all, and write the tables."""
    from lit_unlearn.system.json_files import write_json

    root, results = Path(arguments.root).absolute(), Path(arguments.results)
    (root / "cells").mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    stored = {path.stem.replace("__", "/") for path in (root / "cells").glob("*.json")}
    todo = [cell for cell in cells if cell.key not in known and cell.key not in stored]
    if not arguments.summary_only:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with context.Pool(arguments.processes, maxtasksperchild=12) as pool:
            for line in pool.imap_unordered(partial(store, make=make, root=root), todo):
                print(line, flush=True)
    for path in (root / "cells").glob("*.json"):
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known[content["key"]] = content["result"] | {"took": content["took"]}
    write_json(results, dict(sorted(known.items())))
    given = [argument for argument in sys.argv[1:] if argument != "--summary_only"]
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(given)}".strip()
    text = f"# {title}\n\nMade until {date.today()} by\n\n    {command}\n\n{tables(known)}"
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


def store(cell: Keyed, make: Make, root: Path) -> str:
    """Make a result with one thread and store it; return a line to print."""
    import torch

    from lit_unlearn.system.json_files import write_json

    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        result = make(cell, root)
    except Exception as error:  # any failure of a method is reported, and the bench continues
        return f"FAILED {cell.key}: {type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    write_json(
        root / "cells" / f"{cell.key.replace('/', '__')}.json", {"key": cell.key, "result": result, "took": seconds}
    )
    short = {name: value for name, value in result.items() if isinstance(value, float) or name == "shown"}
    return f"{cell.key} ({seconds:.0f} s) {short}"
