"""Saves the configuration of a command in the folder of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lit_unlearn.system.files import atomic_write


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration into the run's folder: ``config.yaml`` of a fit, ``config_test.yaml`` of a test.

    Args:
        written: The configuration as YAML.
        given: Arguments of Lightning's callback, as ``options``.
    """

    def __init__(self, *given: Any, written: str, **options: Any) -> None:
        super().__init__(*given, **options)
        self.written = written

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            self.config_filename = f"config_{TrainerFn(stage).value}.yaml"
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank, because log_dir is broadcast
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with atomic_write(self.folder / self.config_filename) as file:  # Lightning's own could leave half a file
            file.write(self.written.encode())
