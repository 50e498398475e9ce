"""Writes what a run has trained when it ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lit_unlearn.edits.export import make_public
from lit_unlearn.edits.public import Places
from lit_unlearn.system.files import replaced_entries


class SavePretrained(L.Callback):
    """Calls ``save_pretrained`` of the module when the fit ends, on rank 0.

    Args:
        output: Folder to write; what is there under the same names is replaced, the rest stays.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the trained part; a run that was interrupted writes nothing."""
        if trainer.is_global_zero and not trainer.interrupted:
            pl_module.eval()
            with replaced_entries(self.output) as folder:
                pl_module.save_pretrained(folder)  # type: ignore[operator]
                make_public(folder, Places({}))
