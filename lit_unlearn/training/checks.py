"""What is refused of a recipe before anything is built, and of a fit before it is called finished."""

from __future__ import annotations

import lightning as L

from lit_unlearn.methods.shared.base import DiffusionEditor
from lit_unlearn.system.errors import UserError


def check_that_it_edits(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to call a fit finished that has changed nothing.

    Raises:
        UserError: Every edited weight is that of the base model, bit for bit.
    """
    if isinstance(module, DiffusionEditor) and module.pretrained.unchanged():
        raise UserError(
            f"fit: the edit changes nothing: after {trainer.global_step} steps all {len(module.edited_names)} edited "
            f"weights are those of {module.model_id} bit for bit, so take more steps, a larger learning rate or a "
            "smaller ridge."
        )
