"""Drawings with captions, drawn on the fly from a seed: item ``i`` of a split is always the same picture."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_unlearn.emoji.captions import caption
from lit_unlearn.emoji.drawing import Drawing

SPLITS = ("train", "validation")


class DrawingDataset(Dataset[dict[str, Any]]):
    """A data set of ``size`` drawings, reproducible by index; the two splits never share a seed.

    Items: ``images`` (3, 48, 48) float in [-1, 1]; ``labels`` (3,) int64, indices of subject, style and scene;
    ``captions`` a string.
    """

    def __init__(self, size: int, split: str, seed: int = 0) -> None:
        self.size = size
        self.key = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((*self.key, index))
        drawing = Drawing.sample(rng)
        image = torch.from_numpy(drawing.draw(rng)).permute(2, 0, 1).float() / 127.5 - 1
        labels = torch.tensor([drawing.subject, drawing.style, drawing.scene])
        return {"images": image, "labels": labels, "captions": caption(drawing, rng)}


class Drawings(L.LightningDataModule):
    """Training and held-out drawings.

    Args:
        batch_size: Pictures in a batch.
        steps_per_epoch: Batches in a training epoch; each epoch ends with a checkpoint and a sample grid.
        num_validation: Number of held-out pictures.
        seed: Seed of the drawings.
    """

    def __init__(
        self, batch_size: int = 64, steps_per_epoch: int = 250, num_validation: int = 1280, seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.train = DrawingDataset(batch_size * steps_per_epoch, "train", seed)
        self.validation = DrawingDataset(num_validation, "validation", seed)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Training drawings, shuffled: each epoch has the same drawings in a different order."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Held-out drawings in order."""
        return DataLoader(self.validation, batch_size=self.batch_size)


def blur(images: Tensor, strength: Tensor) -> Tensor:
    """Mix ``images`` (B, C, H, W) with their 3 by 3 mean, by ``strength`` (B,) in [0, 1]."""
    mixed = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, mixed, strength.view(-1, 1, 1, 1))
