"""What the transformer of emoji-dit is trained on: latents of drawings and states of their captions."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import PictureItem, Pictures
from lit_unlearn.emoji.captions import caption
from lit_unlearn.emoji.dit import DiTTraining
from lit_unlearn.emoji.drawing import ATTRIBUTES, Drawing

VALIDATION_SEED = 6_000_000
"""Seed of the first picture that a training draws for its curve."""


class CaptionedLatents:
    """Draws random pairs of a drawing's latent and the states of a true caption.

    Args:
        latents: Latents per combination of attributes, (combinations, drawings, C, 12, 12), float16, unit variance.
        states: States of captions per combination, of CLIP and then of T5, (combinations, captions, L, D), float16.
        pooled: Pooled states of the same captions, (combinations, captions, P), float16.
        empty: States (L, D) and pooled states (P,) of the empty prompt.
        weights: Weight of each combination in the draw, (combinations,).
        empty_share: Share of pairs with the empty prompt as caption (for classifier-free guidance).
        without_t5_share: Share of pairs with zeros instead of the states of T5, as in a pipeline without it.
        t5_length: Positions of T5, the last of the L.
    """

    def __init__(
        self,
        latents: Tensor,
        states: Tensor,
        pooled: Tensor,
        empty: tuple[Tensor, Tensor],
        weights: Tensor,
        empty_share: float,
        without_t5_share: float,
        t5_length: int,
    ) -> None:
        self.latents, self.states, self.pooled, self.empty, self.weights = latents, states, pooled, empty, weights
        self.empty_share, self.without_t5_share, self.t5_length = empty_share, without_t5_share, t5_length

    def pairs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``count`` pairs, and what is added to them, from ``generator``; float32.

        Returns:
            ``latents`` (B, C, 12, 12); ``states`` (B, L, D); ``pooled`` (B, P); and, both standard normal, ``noise``
            (B, C, 12, 12) and ``u`` (B,).
        """
        combination = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        drawing = torch.randint(self.latents.shape[1], (count,), generator=generator)
        words = torch.randint(self.states.shape[1], (count,), generator=generator)
        empty, without_t5 = torch.rand(2, count, generator=generator)
        latents = self.latents[combination, drawing].float()
        states, pooled = self.states[combination, words].float(), self.pooled[combination, words].float()
        states[empty < self.empty_share], pooled[empty < self.empty_share] = self.empty
        states[without_t5 < self.without_t5_share, -self.t5_length :] = 0
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.randn(count, generator=generator)
        return {"latents": latents, "states": states, "pooled": pooled, "noise": noise, "u": u}


class DiTDrawings(L.LightningDataModule):
    """Encodes drawings and captions once with the frozen parts of the module, and provides random pairs.

    The pictures for the curve are those of the evaluation prompts of ``emoji20``, with seeds of their own.

    Args:
        batch_size: Pairs in a batch.
        steps_per_epoch: Batches in an epoch; each epoch ends with a checkpoint and with pictures that are judged.
        drawings: Number of drawings for each of the 320 combinations of subject, style and scene.
        captions: Number of captions for each combination.
        empty_share: Share of items with the empty prompt as caption.
        without_t5_share: Share of items with zeros instead of the states of T5, so that pictures can be drawn without.
        style_weights: How often styles are drawn, relative to 1 for those not named.
        prompts_per_kind: Number of direct and of indirect prompts of each concept for the curve; null means all, 0
            draws none.
        seed: Seed of drawings and captions.

    Raises:
        ValueError: ``style_weights`` names an unknown style.
    """

    def __init__(
        self,
        batch_size: int = 48,
        steps_per_epoch: int = 500,
        drawings: int = 48,
        captions: int = 48,
        empty_share: float = 0.1,
        without_t5_share: float = 0.1,
        style_weights: dict[str, float] | None = None,
        prompts_per_kind: int | None = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.drawings, self.captions = drawings, captions
        self.empty_share, self.without_t5_share = empty_share, without_t5_share
        self.style_weights = dict(style_weights or {})
        self.prompts_per_kind, self.seed = prompts_per_kind, seed
        if unknown := set(self.style_weights) - set(ATTRIBUTES["style"]):
            raise ValueError(
                f"style_weights names {', '.join(sorted(unknown))}: the styles are {', '.join(ATTRIBUTES['style'])}."
            )

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Encode all drawings and captions, which takes a few minutes on one core.

        Raises:
            ValueError: The module is not ``DiTTraining``.
        """
        if hasattr(self, "train"):
            return
        module = self.trainer and self.trainer.lightning_module
        if not isinstance(module, DiTTraining):
            raise ValueError(f"DiTDrawings encodes with the parts of DiTTraining, not {type(module).__name__}.")
        pipeline = module.pipeline()

        def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
            states, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=module.t5_length
            )
            return states, pooled

        vae, latents, states, pooled, weights = pipeline.vae, [], [], [], []
        rng = np.random.default_rng((self.seed, 4))
        for combination in np.ndindex(*(len(values) for values in ATTRIBUTES.values())):
            drawing = Drawing(*combination)
            pictures = torch.from_numpy(np.stack([drawing.draw(rng) for _ in range(self.drawings)]))
            pictures = pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            latents.append((vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor).half())
            said = encode([caption(drawing, rng) for _ in range(self.captions)])
            states.append(said[0].half())
            pooled.append(said[1].half())
            weights.append(self.style_weights.get(ATTRIBUTES["style"][drawing.style], 1.0))
        empty = encode([""])
        self.train = CaptionedLatents(
            torch.stack(latents),
            torch.stack(states),
            torch.stack(pooled),
            (empty[0][0], empty[1][0]),
            torch.tensor(weights),
            self.empty_share,
            self.without_t5_share,
            module.t5_length,
        )

    def train_dataloader(self) -> DataLoader[int]:
        """One number for each step of an epoch; the pairs are drawn when the step begins."""
        return DataLoader(range(self.steps_per_epoch), batch_size=None)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the pairs of a training step from a generator of its own, so that a fit that goes on draws the same."""
        if self.trainer is None or not self.trainer.training:
            return batch
        generator = torch.Generator().manual_seed(1_000_000_007 * (self.seed + 1) + self.trainer.global_step)
        return self.train.pairs(self.batch_size, generator)

    def val_dataloader(self) -> list[DataLoader[PictureItem]]:
        """Prompts, questions and seeds of the pictures that are judged; no loader if there are none."""
        items = Pictures(load_concept_set("emoji20"), 1, VALIDATION_SEED, self.prompts_per_kind).items
        return [DataLoader(items, batch_size=40, collate_fn=list)] if items else []  # type: ignore[arg-type]
