"""How a trainer writes its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_unlearn.system.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that readers see either the old file or the complete new one.

    The file is on disk when the call returns. Lightning's own class writes a temporary file elsewhere, which is copied
    if it lies on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` to ``path``."""
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
