"""What a report says beside its tables: what a column means, and which runs are not finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.system.run_file import unfinished

CROSSWISE = (
    "Crosswise: pictures of each edited concept's prompts that do not show another edited one. Two concepts that "
    "have changed places are forgotten, and crosswise is 0."
)


def notes(runs: Sequence[tuple[Path, Scores]]) -> list[str]:
    """Notes on ``runs``, each a folder and its scores."""
    found = [CROSSWISE] if any(scores.crosswise is not None for _, scores in runs) else []
    states = [(folder, unfinished(folder)) for folder, _ in runs]
    return found + [f"{folder.as_posix()} {state}." for folder, state in states if state is not None]
