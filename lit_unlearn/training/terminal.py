"""What a command of the trainer shows on the terminal: progress in 80 columns, scores, and where they lie."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typing_extensions import override

from lit_unlearn.system.progress import in_notebook

RESULTS = {
    "fit": ("checkpoints/last.ckpt", "embeddings.safetensors"),
    "test": ("scores.json", "memorisation.json", "grid.png"),
    "predict": ("pictures",),
}
"""Files that a command writes into the folder of a run, in the order in which they are named."""


class RunProgress(RichProgressBar):
    """A progress bar of one line at 80 columns, which counts what limits the fit: its steps or its epochs."""

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {}  # the curves are in TensorBoard; beside the bar they would wrap

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 2:
            return "Steps"
        return f"Epoch {current_epoch + 1}/{epochs}"


class NotebookProgress(TQDMProgressBar):
    """A progress bar for a notebook, where rich's needs ipywidgets."""

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {}


def progress_bars(given: Any, callbacks: Sequence[Callback]) -> list[Callback]:
    """The progress bar to add: none if it is switched off, if the recipe has its own, or if nobody is looking.

    Args:
        given: The recipe's ``trainer.enable_progress_bar``.
        callbacks: The recipe's callbacks.
    """
    if given is False or any(isinstance(one, ProgressBar) for one in callbacks):
        return []
    if in_notebook():
        return [NotebookProgress(leave=False)]
    if not sys.stdout.isatty():
        return []
    return [RunProgress(leave=False)]


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Scores that a validation logged as ``validation/before/NAME`` and ``validation/after/NAME``, rounded."""
    table = Table()
    for heading in ("score", "before", "after"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name in sorted({name.rpartition("/")[2] for name in metrics}):
        values = [metrics.get(f"validation/{which}/{name}") for which in ("before", "after")]
        table.add_row(name.replace("_", " "), *("-" if value is None else f"{float(value):.2f}" for value in values))
    return table


def say_where(subcommand: str, folder: Path) -> None:
    """Print where the results of a command lie.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        folder: The run's folder.
    """
    found = [name for name in RESULTS.get(subcommand, ()) if (folder / name).exists()]
    print(f"{folder}: {', '.join(found)}" if found else f"{folder}", flush=True)


def say_scores(metrics: Mapping[str, Any]) -> None:
    """Print the scores of a validation as a table."""
    Console().print(metrics_table(metrics))
