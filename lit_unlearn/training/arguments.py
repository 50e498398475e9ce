"""The options that ``fit``, ``validate``, ``test`` and ``predict`` have besides the trainer's, model's and data's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CommandOption:
    """An option of a command; see ``argparse`` for the fields.

    Attributes:
        name: Without the dashes.
        help: What it does, as one sentence.
        type: Of its value; None for a switch.
    """

    name: str
    help: str
    type: Any = None


OPTIONS = (
    CommandOption("concept", "Name of the concept to edit, or several: '[dog, cat]'.", str | list[str] | None),
    CommandOption(
        "after",
        "Checkpoints or deltas whose concepts are edited again, together with the new ones.",
        str | list[str] | None,
    ),
    CommandOption(
        "base_edit",
        "Checkpoints or deltas of edits that the fit starts from and keeps: an edit on top of them.",
        str | list[str] | None,
    ),
    CommandOption("method", "Name of the recipe in logs/METHOD/CONCEPT/version_N.", str | None),
    CommandOption("overwrite", "Let a test replace the scores that its run already has."),
    CommandOption("fresh", "Start a new fit, though the same command was interrupted before."),
    CommandOption("once", "Do nothing if the same command has already finished."),
)
LIGHTNINGS = {
    "config": "Recipe; several override one another.",
    "seed_everything": "Seed of the run; default: the recipe's, or 0.",
    "ckpt_path": "Checkpoint or folder of a run, or last; default: the newest run, and none for fit.",
    "print_config": "Print the whole configuration, and stop.",
}
"""Options of LightningCLI that are worth showing, each with what it does."""
OF_THE_TRAINER = {"weights_only", "verbose", "return_predictions"}
"""Arguments of the trainer's methods, which are options too."""
SECTIONS = ("model", "data", "edit", "trainer")
