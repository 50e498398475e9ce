"""Where the callbacks of a run write."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def folder_of(trainer: L.Trainer) -> Path:
    """Where a run keeps what it makes: the logger's version folder, or the default root; to be asked on every rank."""
    return Path(trainer.log_dir or trainer.default_root_dir)
