"""The judge of emoji-sd: an independent classifier of subject, style and scene, trained on drawings only.

It never sees a generated picture in training; noise and blur make it tolerant of the small flaws of one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_unlearn.emoji.data import blur
from lit_unlearn.emoji.drawing import ATTRIBUTES


class EmojiClassifier(nn.Module):
    """Convolutional network with a head for each attribute.

    Args:
        width: Channels of the first stage; each of the four stages doubles them (up to 4 times) and halves the picture.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inside, outside, 3, stride=2, padding=1),
                nn.GroupNorm(8, outside),
                nn.SiLU(),
                nn.Conv2d(outside, outside, 3, padding=1),
                nn.GroupNorm(8, outside),
                nn.SiLU(),
            )
            for inside, outside in zip(widths, widths[1:], strict=False)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """Mean and maximum over positions of the last stage, (B, 8 * width), of ``images`` (B, 3, H, W) in [-1, 1]."""
        hidden = images
        for stage in self.stages:
            hidden = stage(hidden)
        return torch.cat([hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, number of values) per attribute, of ``images`` (B, 3, H, W) in [-1, 1]."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


class EmojiJudge:
    """Answers questions on pictures of emoji-sd; see ``lit_unlearn.evaluation.judges.Judge``.

    Args:
        path: Folder with ``model.safetensors`` and ``config.json`` (which names the questions).
        device: Where the classifier runs.

    Raises:
        ValueError: The folder lacks a file, or (when called) a question is not among those of ``config.json``.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.path = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (self.path / name).is_file():
                raise ValueError(f"judge={str(path)!r} has no {name}: point it at a folder made by emoji/judge.yaml.")
        config = json.loads((self.path / "config.json").read_text())
        self.name = str(config["name"])
        self.questions: dict[str, tuple[str, str]] = {key: tuple(value) for key, value in config["questions"].items()}
        self.classifier = EmojiClassifier(config["width"])
        self.classifier.load_state_dict(load_file(self.path / "model.safetensors"))
        self.classifier.eval().to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (B,) for ``images`` (B, 3, H, W) in [0, 1], one question each."""
        unknown = sorted(set(questions) - set(self.questions))
        if unknown:
            raise ValueError(f"The judge {self.name!r} cannot answer {unknown[0]!r}: its config.json lists the questions.")
        probabilities = {
            attribute: logits.float().softmax(dim=-1).cpu()
            for attribute, logits in self.classifier(images.to(self.device) * 2 - 1).items()
        }
        answers = []
        for row, question in enumerate(questions):
            attribute, value = self.questions[question]
            answers.append(probabilities[attribute][row, ATTRIBUTES[attribute].index(value)])
        return torch.stack(answers)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, 8 * width) of ``images`` (B, 3, H, W) in [0, 1], for distances between pictures."""
        return self.classifier.features(images.to(self.device) * 2 - 1).cpu()


class JudgeTraining(L.LightningModule):
    """Trains the judge: cross-entropy of the three heads on augmented drawings.

    Args:
        width: Channels of the first stage of the classifier.
        lr: Peak learning rate of AdamW (one-cycle schedule).
    """

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.lr = width, lr
        self.classifier = EmojiClassifier(width)

    def augment(self, images: Tensor) -> Tensor:
        """Add noise (standard deviation up to 0.2) and blur, each of a random strength per picture."""
        strength = torch.rand(2, len(images), device=images.device)
        noise = torch.randn_like(images) * 0.2 * strength[0].view(-1, 1, 1, 1)
        return blur(images, strength[1]) + noise

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy over the heads."""
        logits = self.classifier(self.augment(batch["images"]))
        losses = [F.cross_entropy(logits[name], batch["labels"][:, i]) for i, name in enumerate(ATTRIBUTES)]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy per head on held-out drawings, without augmentation."""
        logits = self.classifier(batch["images"])
        for i, name in enumerate(ATTRIBUTES):
            accuracy = (logits[name].argmax(dim=-1) == batch["labels"][:, i]).float().mean()
            self.log(f"validation/{name}", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW under a one-cycle schedule over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, output: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into the folder ``output``."""
        output.mkdir(parents=True, exist_ok=True)
        save_file(self.classifier.state_dict(), output / "model.safetensors")
        config = {"name": "emoji-cnn", "width": self.width, "questions": emoji_questions()}
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def emoji_questions() -> dict[str, tuple[str, str]]:
    """Question of each concept of ``emoji20`` to (attribute, value) of the drawing that answers it."""
    from lit_unlearn.data.concepts import load_concept_set

    where = {value: (attribute, value) for attribute, values in ATTRIBUTES.items() for value in values}
    return {concept.question: where[name] for name, concept in load_concept_set("emoji20").concepts.items()}
