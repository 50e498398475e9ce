"""The folder that the callbacks of a run write to."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def folder_of(trainer: L.Trainer) -> Path:
    """Folder of a run's results: the logger's version folder, or the default root; every rank must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)
