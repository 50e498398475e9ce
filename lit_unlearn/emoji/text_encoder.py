"""Trains the text encoder of emoji-sd: a ``CLIPTextModel`` whose end-of-text state encodes what a caption describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_unlearn.emoji.captions import vocabulary
from lit_unlearn.emoji.drawing import ATTRIBUTES

MAX_LENGTH = 32
"""Positions of a prompt; the longest caption has 26 words."""


def train_tokenizer() -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's kind: each word of the captions is one token, other words are several."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        end_of_word_suffix="</w>",
        initial_alphabet=list(letters),
        # Ties between merges are broken by number. Without this the last letters would be numbered in the order of a
        # hash map, and a resumed training would have other tokens.
        special_tokens=[letter + "</w>" for letter in letters],
        show_progress=False,
        min_frequency=1,
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=MAX_LENGTH,
    )


class TextEncoderTraining(L.LightningModule):
    """Trains text encoder and three linear heads on captions: cross-entropy of subject, style and scene.

    The heads are needed only for training and are not saved. For attributes that a caption does not mention, they learn
    a distribution.

    Args:
        hidden_size: Width of the encoder.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        lr: Peak learning rate of AdamW (one-cycle schedule).
    """

    def __init__(self, hidden_size: int = 192, num_layers: int = 6, num_heads: int = 4, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.tokenizer = train_tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=hidden_size,
                intermediate_size=4 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=hidden_size,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_size, len(values)) for name, values in ATTRIBUTES.items()})

    def logits(self, captions: list[str]) -> dict[str, Tensor]:
        """Logits (B, number of values) per attribute, from the end-of-text states."""
        ids = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids.to(self.device)
        pooled = self.text_encoder(ids).pooler_output
        return {name: head(pooled) for name, head in self.heads.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy over the heads."""
        logits = self.logits(batch["captions"])
        loss = torch.stack(
            [F.cross_entropy(logits[name], batch["labels"][:, i]) for i, name in enumerate(ATTRIBUTES)]
        ).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy per head on held-out captions; attributes that a caption does not mention can only be guessed."""
        logits = self.logits(batch["captions"])
        for i, name in enumerate(ATTRIBUTES):
            accuracy = (logits[name].argmax(dim=-1) == batch["labels"][:, i]).float().mean()
            self.log(f"validation/{name}", accuracy, prog_bar=True, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, output: Path) -> None:
        """Write ``output/text_encoder`` and ``output/tokenizer``."""
        self.text_encoder.save_pretrained(output / "text_encoder")
        self.tokenizer.save_pretrained(output / "tokenizer")
