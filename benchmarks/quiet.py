"""Runs the trainer's commands in a bench without progress bars, with all output in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append the output of the block, also of C libraries, to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    try:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os.dup2(kept[0], 1), os.dup2(kept[1], 2)
    finally:
        os.close(kept[0]), os.close(kept[1])
