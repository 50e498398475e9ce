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
SPONTANEOUS = (
    "Spontaneous: pictures of retained prompts that show an edited concept which they do not name. An attack that "
    "succeeds no more often than the unedited model shows the concept unasked has found nothing."
)
REACH = (
    "Reach: how near keys of the retained span come to what the concept's keys gave, 0 for all the way, in the place "
    "where they come nearest. No edit in the null space raises it; a large one does not mean that the concept is safe."
)


def notes(runs: Sequence[tuple[Path, Scores]]) -> list[str]:
    """Notes on ``runs``, each a folder and its scores."""
    found = [CROSSWISE] if any(scores.crosswise is not None for _, scores in runs) else []
    found += [SPONTANEOUS] if any(scores.spontaneous is not None for _, scores in runs) else []
    found += [REACH] if any("reach" in scores.edit for _, scores in runs) else []
    states = [(folder, unfinished(folder)) for folder, _ in runs]
    return found + [f"{folder.as_posix()} {state}." for folder, state in states if state is not None]
