"""Trains the three text encoders of emoji-dit, as Stable Diffusion 3 has them: two of CLIP and one of T5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from lit_unlearn.emoji.captions import caption, vocabulary
from lit_unlearn.emoji.data import SPLITS
from lit_unlearn.emoji.drawing import ATTRIBUTES, Drawing
from lit_unlearn.emoji.text_encoder import train_tokenizer

MAX_LENGTH = 28
"""Positions of a prompt in each encoder: the longest caption has 26 words, between begin and end of text."""

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer of T5's kind: each word of the captions is one token, other words are spelled in letters.

    As with T5, upper and lower case differ; words of the captions are in lower case.
    """
    signs = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    # A segmentation's score is the sum of its pieces', so a whole word beats its letters.
    pieces = [("▁", -10.0), *((sign, -10.0) for sign in signs), *((f"▁{word}", -5.0) for word in vocabulary())]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=MAX_LENGTH)


class CaptionDataset(Dataset[dict[str, Any]]):
    """Captions of drawings, reproducible by index; the two splits never share a seed.

    Items: ``captions`` a string; ``labels`` (3,) int64, indices of subject, style and scene.
    """

    def __init__(self, size: int, split: str, seed: int = 0) -> None:
        self.size = size
        self.key = (seed, 3, SPLITS.index(split))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((*self.key, index))
        drawing = Drawing.sample(rng)
        labels = torch.tensor([drawing.subject, drawing.style, drawing.scene])
        return {"captions": caption(drawing, rng), "labels": labels}


class Captions(L.LightningDataModule):
    """Training and held-out captions, without the drawings.

    Args:
        batch_size: Captions in a batch.
        steps_per_epoch: Batches in a training epoch; each epoch ends with a checkpoint.
        num_validation: Number of held-out captions.
        seed: Seed of the captions.
    """

    def __init__(
        self, batch_size: int = 64, steps_per_epoch: int = 100, num_validation: int = 1280, seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.train = CaptionDataset(batch_size * steps_per_epoch, "train", seed)
        self.validation = CaptionDataset(num_validation, "validation", seed)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Training captions, shuffled: each epoch has the same captions in a different order."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Held-out captions in order."""
        return DataLoader(self.validation, batch_size=self.batch_size)


class DiTTextTraining(L.LightningModule):
    """Trains three text encoders on captions: linear heads tell subject, style and scene, by cross-entropy.

    The heads read what Stable Diffusion 3 reads: of a CLIP encoder the projected end-of-text state and the end-of-text
    state of ``hidden_states[-2]``, of T5 the last state of the end-of-text token. They are needed only for training and
    are not saved. The encoders share nothing; they are trained together to have one recipe.

    Args:
        hidden_sizes: Widths of CLIP, the second CLIP and T5. The states of the two CLIP encoders are concatenated and
            padded to the width of T5, which must be at least as large as their sum.
        depths: Transformer layers of each.
        attention_heads: Attention heads of each.
        lr: Peak learning rate of AdamW (one-cycle schedule).

    Raises:
        ValueError: T5 is narrower than both CLIP encoders together, or a CLIP encoder has less than two layers.
    """

    def __init__(
        self,
        hidden_sizes: tuple[int, int, int] = (128, 192, 384),
        depths: tuple[int, int, int] = (4, 5, 3),
        attention_heads: tuple[int, int, int] = (4, 6, 6),
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if sum(hidden_sizes[:2]) > hidden_sizes[2]:
            raise ValueError(
                f"hidden_sizes={list(hidden_sizes)}: the last, of T5, must be at least {sum(hidden_sizes[:2])}, the "
                "sum of the other two."
            )
        if min(depths[:2]) < 2:
            raise ValueError(f"depths={list(depths)}: the second-last layer of CLIP is read, so give it at least 2.")
        self.lr = lr
        clip_tokenizer = train_tokenizer()
        clip_tokenizer.model_max_length = MAX_LENGTH
        self.tokenizers = (clip_tokenizer, clip_tokenizer, t5_tokenizer())
        for name, width, depth, heads in zip(ENCODERS[:2], hidden_sizes, depths, attention_heads, strict=False):
            config = CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=width,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
            self.add_module(name, CLIPTextModelWithProjection(config))
        self.text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizers[2]),
                d_model=hidden_sizes[2],
                d_ff=2 * hidden_sizes[2],
                d_kv=32,
                num_heads=attention_heads[2],
                num_layers=depths[2],
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        widths = {**{f"{name}/{at}": w for name, w in zip(ENCODERS, hidden_sizes, strict=True) for at in READ[name]}}
        self.heads = nn.ModuleDict(
            {
                f"{read}/{attribute}": nn.Linear(width, len(values))
                for read, width in widths.items()
                for attribute, values in ATTRIBUTES.items()
            }
        )

    def read(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the heads read, (B, D) each: ``text_encoder/pooled``, ``text_encoder/state``, ..."""
        found = {}
        for name, tokenizer in zip(ENCODERS, self.tokenizers, strict=True):
            ids = tokenizer(
                list(captions), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            ).input_ids.to(self.device)
            end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)  # the first: CLIP also pads with it
            rows = torch.arange(len(ids), device=ids.device)
            # No mask, as in the pipeline: T5 also attends to padding.
            if name == "text_encoder_3":
                found[f"{name}/state"] = self.text_encoder_3(ids).last_hidden_state[rows, end]
            else:
                said = getattr(self, name)(ids, output_hidden_states=True)
                found[f"{name}/pooled"] = said.text_embeds
                found[f"{name}/state"] = said.hidden_states[-2][rows, end]
        return found

    def logits(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Logits (B, number of values) of each head, by ``encoder/what is read/attribute``."""
        read = self.read(captions)
        return {name: head(read[name.rpartition("/")[0]]) for name, head in self.heads.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy over the heads."""
        # PyTorch's fused attention in bfloat16 is slower on processors than its plain one.
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.logits(batch["captions"])
        labels = dict(zip(ATTRIBUTES, batch["labels"].unbind(1), strict=True))
        losses = [F.cross_entropy(found, labels[name.rpartition("/")[2]]) for name, found in logits.items()]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy per head on held-out captions; attributes that a caption does not mention can only be guessed."""
        labels = dict(zip(ATTRIBUTES, batch["labels"].unbind(1), strict=True))
        for name, found in self.logits(batch["captions"]).items():
            accuracy = (found.argmax(dim=-1) == labels[name.rpartition("/")[2]]).float().mean()
            self.log(f"validation/{name}", accuracy, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, output: Path) -> None:
        """Write the encoders, in half precision, and their tokenizers into folders of ``output``.

        The configurations say float32, so that the weights are loaded in it, as those of the other parts are.
        """
        for name, tokenizer in zip(ENCODERS, self.tokenizers, strict=True):
            encoder = getattr(self, name)
            encoder.save_pretrained(
                output / name, state_dict={key: weight.half() for key, weight in encoder.state_dict().items()}
            )
            tokenizer.save_pretrained(output / name.replace("text_encoder", "tokenizer"))


READ = {"text_encoder": ("pooled", "state"), "text_encoder_2": ("pooled", "state"), "text_encoder_3": ("state",)}
"""What of each encoder the heads read."""
