"""Writes the trained part of a model when a run ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.diffusion.source import SHIPPED, shipped_folder
from lit_unlearn.edits.export import make_public
from lit_unlearn.edits.public import Places
from lit_unlearn.emoji.parts import FOLDER
from lit_unlearn.system.files import replaced_entries


class SavePretrained(L.Callback):
    """Calls ``save_pretrained`` of the module when the fit ends, on rank 0.

    Args:
        output: Folder to write; files of the same names are replaced, other files are kept. Null means ``pretrained``
            in the run's folder, with a subfolder that has the part's name in the model.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = None if output is None else Path(output).expanduser()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to overwrite an embedded model, which all commands use.

        Raises:
            ValueError: The output is an embedded model or a folder in it.
        """
        if self.output is None:
            return
        shipped = {folder.resolve() for name in SHIPPED if (folder := shipped_folder(name))}
        if shipped & {self.output.resolve(), *self.output.resolve().parents}:
            raise ValueError(
                f"SavePretrained.output={self.output} is an embedded model: leave it out, which writes into the run's "
                "folder, and put the result in place with python -m lit_unlearn.emoji.replace."
            )

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the trained part, unless the run was interrupted."""
        if trainer.is_global_zero and not trainer.interrupted:
            pl_module.eval()
            output = self.output or folder_of(trainer) / FOLDER / getattr(pl_module, "part", "")
            with replaced_entries(output) as folder:
                pl_module.save_pretrained(folder)  # type: ignore[operator]
                make_public(folder, Places({}))
