"""Writes the pictures of ``predict`` to disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.data.images import CaptionItem
from lit_unlearn.data.prompts import PictureItem
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.system.names import file_name
from lit_unlearn.system.pixels import save_png, to_pil


class SavePictures(BasePredictionWriter):
    """Saves each picture as ``CONCEPT/PROMPT-IMAGE.png`` (numbers from 0, direct prompts first), batch by batch.

    Pictures of captions go to ``forget/CAPTION-IMAGE.png`` and ``keep/CAPTION-IMAGE.png``.

    Args:
        output: Folder to write; null means ``pictures`` in the run's folder.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output).expanduser() if output else None

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder = self.output or folder_of(trainer) / "pictures"

    @override
    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: list[Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for item, picture in zip(batch, prediction, strict=True):
            path = self.folder / _name(pl_module, item)
            save_png(path, to_pil(picture.float() / 255))


def _name(module: L.LightningModule, item: PictureItem | CaptionItem) -> str:
    if isinstance(item, CaptionItem):
        caption = re.sub(r"[^\w.-]+", "_", item.prompt)[:80]
        return f"{item.kind}/{item.caption_index:03}_{caption}-{item.image_index}.png"
    assert isinstance(module, ConceptEditor)
    concept = file_name(list(module.concepts.concepts)[item.concept_index])
    return f"{concept}/{item.prompt_index}-{item.image_index}.png"
