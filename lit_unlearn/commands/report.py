"""``lit-unlearn report``: compare tested runs in Markdown, CSV and one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.commands.parser import Parser, command_parser
from lit_unlearn.system.errors import user_errors
from lit_unlearn.system.files import atomic_write
from lit_unlearn.system.run_file import scores_files

DESCRIPTION = "compare tested runs: Markdown, CSV and one HTML page"


def parser() -> Parser:
    """Options of ``report``."""
    made = command_parser("report", DESCRIPTION)
    made.add_argument("folders", nargs="+", metavar="LOGS", help="folders to search for tested runs")
    made.add_argument("-o", "--output", default="report", metavar="DIR", help="folder to write; default: report")
    made.add_argument("--grids", type=int, default=1, help="picture grids of each method; default: 1")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    return made


def run(options: argparse.Namespace) -> None:
    """Write ``report.md``, ``report.csv`` and ``report.html`` of all tested runs below some folders.

    Raises:
        UserError: A folder contains no run, a file cannot be read, or the output exists.
        OSError: The output cannot be written.
    """
    output = Path(options.output)
    with user_errors():
        if options.grids < 0:
            raise ValueError(f"grids={options.grids} cannot be negative.")
        files = [output / f"report.{kind}" for kind in ("md", "csv", "html")]
        if (there := [path for path in files if path.exists()]) and not options.overwrite:
            raise ValueError(f"output={there[0]} exists: choose another folder, or pass --overwrite to replace it.")
        scores_files(options.folders)  # mistakes are told before figures are imported, which takes seconds
        from lit_unlearn.reports.page import report_html
        from lit_unlearn.reports.report import by_protocol, find_runs, report_csv, report_markdown, separately

        runs = find_runs(options.folders)
    if len(protocols := by_protocol(runs)) > 1:
        print(separately(len(protocols)))
    contents = report_markdown(runs), report_csv(runs), report_html(runs, options.grids)
    for path, content in zip(files, contents, strict=True):
        with atomic_write(path) as file:
            file.write(content.encode())
        print(path)
