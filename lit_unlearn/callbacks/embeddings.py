"""Writes the tokens that a textual inversion has learned."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.callbacks.modules import expect_module
from lit_unlearn.methods.textual_inversion import TextualInversion
from lit_unlearn.system.files import atomic_write

FILE = "embeddings.safetensors"


class SaveEmbeddings(L.Callback):
    """Writes ``embeddings.safetensors`` into the run's folder when the fit ends, for the option ``embeddings``.

    The file holds ``embeddings`` (n, D), float32, and names their concept and the vocabulary they belong to.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        expect_module(self, pl_module, TextualInversion, "writes what TextualInversion learns")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TextualInversion)
        folder = folder_of(trainer)  # called on every rank, since they exchange it
        if not trainer.is_global_zero or trainer.interrupted:
            return
        embeddings = pl_module.embeddings.detach().float().cpu().contiguous()
        metadata = {
            "concept": pl_module.concept.name,
            "vocabulary": pl_module.vocabulary,
            "model": pl_module.model_id,
            "templates": " | ".join(pl_module.templates),
        }
        with atomic_write(folder / FILE) as file:
            file.write(save({"embeddings": embeddings}, metadata))
        rank_zero_info(f"Tokens: {folder / FILE}")
