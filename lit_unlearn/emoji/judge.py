"""Trains the judge of emoji-sd: an independent classifier of subject, style and scene.

It is trained on drawings and never on generated pictures; noise and blur make it tolerant of their small flaws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.emoji.data import blur
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.judges.classifier import Architecture, AttributeClassifier


class JudgeTraining(L.LightningModule):
    """Trains the judge: cross-entropy of the three heads on augmented drawings.

    Args:
        width: Channels of the first stage of the classifier.
        lr: Peak learning rate of AdamW (one-cycle schedule).
        architecture: ``convolution``, or ``transformer`` for the second judge; see ``AttributeClassifier``.
    """

    part = "judge"
    """The part of the model that it trains."""

    def __init__(self, width: int = 32, lr: float = 2e-3, architecture: Architecture = "convolution") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.lr, self.architecture = width, lr, architecture
        self.part = "judge" if architecture == "convolution" else "second_judge"
        self.classifier = AttributeClassifier(ATTRIBUTES, width, architecture)

    def augment(self, images: Tensor) -> Tensor:
        """Add noise (standard deviation up to 0.2) and blur to ``images``, each with a random strength per picture."""
        strength = torch.rand(2, len(images), device=images.device)
        noise = torch.randn_like(images) * 0.2 * strength[0].view(-1, 1, 1, 1)
        return blur(images, strength[1]) + noise

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy over the heads."""
        logits = self.classifier(self.augment(batch["images"]))
        losses = [F.cross_entropy(logits[name], batch["labels"][:, i]) for i, name in enumerate(ATTRIBUTES)]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy per head on held-out drawings, without augmentation."""
        logits = self.classifier(batch["images"])
        for i, name in enumerate(ATTRIBUTES):
            accuracy = (logits[name].argmax(dim=-1) == batch["labels"][:, i]).float().mean()
            self.log(f"validation/{name}", accuracy, prog_bar=True, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, output: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into the folder ``output``."""
        output.mkdir(parents=True, exist_ok=True)
        save_file(self.classifier.state_dict(), output / "model.safetensors")
        config = {
            "name": "emoji-cnn" if self.architecture == "convolution" else "emoji-transformer",
            "width": self.width,
            "architecture": self.architecture,
            "attributes": ATTRIBUTES,
            "questions": emoji_questions(),
        }
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def emoji_questions() -> dict[str, tuple[str, str]]:
    """For the question of each concept of ``emoji20``, the attribute and value of a drawing for which it is yes."""
    where = {value: (attribute, value) for attribute, values in ATTRIBUTES.items() for value in values}
    return {concept.question: where[name] for name, concept in load_concept_set("emoji20").concepts.items()}
