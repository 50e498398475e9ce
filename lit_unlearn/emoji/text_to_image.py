"""Trains the UNet of emoji-sd on latents of drawings and states of their captions, and writes the whole pipeline.

Autoencoder and text encoder are frozen, so their outputs are computed once and kept in memory; a training step runs
only the UNet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_unlearn.emoji.captions import caption
from lit_unlearn.emoji.drawing import ATTRIBUTES, RESOLUTION, Drawing
from lit_unlearn.emoji.parts import trained_part

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
"""As in Stable Diffusion 1.x."""


class CaptionedLatents(Dataset[dict[str, Tensor]]):
    """Pairs of a drawing's latent and the states of a true caption; each access makes a new random pair.

    Items: ``latents`` (C, 12, 12), unit variance; ``encoder_hidden_states`` (32, D).

    Args:
        latents: Latents per combination of attributes, (combinations, drawings, C, 12, 12), float16.
        states: Caption states per combination, (combinations, captions, 32, D), float16.
        unconditional: States of the empty prompt, (32, D).
        unconditional_share: Share of items with the empty prompt as caption (for classifier-free guidance).
        size: Length of an epoch.
    """

    def __init__(
        self, latents: Tensor, states: Tensor, unconditional: Tensor, unconditional_share: float, size: int
    ) -> None:
        self.latents, self.states, self.unconditional = latents, states, unconditional
        self.unconditional_share, self.size = unconditional_share, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # torch's generator is restored with a checkpoint, so a resumed run also sees new pairs.
        combination, drawing, words = (
            int(torch.randint(high, (1,))) for high in (*self.latents.shape[:2], self.states.shape[1])
        )
        empty = torch.rand(1).item() < self.unconditional_share
        states = self.unconditional if empty else self.states[combination, words]
        return {"latents": self.latents[combination, drawing].float(), "encoder_hidden_states": states.float()}


class LatentDrawings(L.LightningDataModule):
    """Encodes drawings and captions once with the frozen parts of the module, and provides random pairs.

    Args:
        batch_size: Pairs in a batch.
        steps_per_epoch: Batches in an epoch; each epoch ends with a checkpoint and a sample grid.
        drawings: Number of drawings for each of the 320 combinations of subject, style and scene.
        captions: Number of captions for each combination.
        unconditional_share: Share of items with the empty prompt as caption.
        sample_prompts: Prompts drawn after each epoch, eight to a row.
        seed: Seed of drawings and captions.
    """

    def __init__(
        self,
        batch_size: int = 64,
        steps_per_epoch: int = 500,
        drawings: int = 64,
        captions: int = 128,
        unconditional_share: float = 0.1,
        sample_prompts: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sample_prompts = list(sample_prompts)
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.drawings, self.captions = drawings, captions
        self.unconditional_share, self.seed = unconditional_share, seed

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Encode all drawings and captions, which takes a few minutes on two cores."""
        if hasattr(self, "train"):
            return
        module = self.trainer and self.trainer.lightning_module
        if not isinstance(module, TextToImageTraining):
            raise ValueError(
                f"LatentDrawings encodes with the parts of TextToImageTraining, not {type(module).__name__}."
            )
        vae = AutoencoderKL.from_pretrained(module.parts["vae"]).eval()
        tokenizer = CLIPTokenizer.from_pretrained(module.parts["tokenizer"])
        text_encoder = CLIPTextModel.from_pretrained(module.parts["text_encoder"]).eval()

        def encode(prompts: list[str]) -> Tensor:
            ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            return text_encoder(ids).last_hidden_state

        latents, states = [], []
        rng = np.random.default_rng((self.seed, 2))
        for combination in np.ndindex(*(len(values) for values in ATTRIBUTES.values())):
            drawing = Drawing(*combination)
            pictures = torch.from_numpy(np.stack([drawing.draw(rng) for _ in range(self.drawings)]))
            pictures = pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            latents.append((vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor).half())
            states.append(encode([caption(drawing, rng) for _ in range(self.captions)]).half())
        self.train = CaptionedLatents(
            torch.stack(latents),
            torch.stack(states),
            encode([""])[0],
            self.unconditional_share,
            self.batch_size * self.steps_per_epoch,
        )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Random pairs; the index of an item has no meaning."""
        return DataLoader(self.train, batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader[str]:
        """The sample prompts."""
        return DataLoader(self.sample_prompts, batch_size=8)  # type: ignore[arg-type]


class TextToImageTraining(L.LightningModule):
    """Trains the UNet with the noise-prediction loss (Ho et al., 2020) and assembles the pipeline.

    Args:
        model: Folder of a pipeline or ``emoji-sd``; its autoencoder, text encoder and tokenizer are used.
        vae: Folder of a run that has trained the autoencoder; null takes the autoencoder of ``model``.
        text_encoder: Folder of a run that has trained text encoder and tokenizer; null takes both from ``model``.
        block_out_channels: Channels of the UNet per resolution, 12 by 12 first.
        attention: For each resolution, whether it attends to the caption.
        num_heads: Attention heads.
        lr: Peak learning rate of AdamW, after a warm-up of 2 % and before a cosine decay to zero.
        guidance_scale: Strength of classifier-free guidance in the sample grid.

    Raises:
        ValueError: A run has not trained that part.
    """

    def __init__(
        self,
        model: str = "emoji-sd",
        vae: str | None = None,
        text_encoder: str | None = None,
        block_out_channels: tuple[int, ...] = (64, 128),
        attention: tuple[bool, ...] = (False, True),
        num_heads: int = 4,
        lr: float = 1.5e-3,
        guidance_scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.guidance_scale = lr, guidance_scale
        runs = {"vae": vae, "text_encoder": text_encoder, "tokenizer": text_encoder}
        self.parts = {part: trained_part(part, run, model) for part, run in runs.items()}
        vae_config = AutoencoderKL.load_config(self.parts["vae"])
        text_config = CLIPTextConfig.from_pretrained(self.parts["text_encoder"])
        self.unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 2 ** (len(vae_config["block_out_channels"]) - 1),
            in_channels=vae_config["latent_channels"],
            out_channels=vae_config["latent_channels"],
            block_out_channels=tuple(block_out_channels),
            layers_per_block=1,
            down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
            cross_attention_dim=text_config.hidden_size,
            attention_head_dim=num_heads,  # diffusers reads this as the number of heads
            norm_num_groups=16,
        ).to(memory_format=torch.channels_last)
        self.noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the predicted noise."""
        latents = batch["latents"].contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(NOISE_SCHEDULE["num_train_timesteps"], (len(latents),), device=latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(self.unet(noisy, timesteps, batch["encoder_hidden_states"]).sample, noise)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[str], batch_idx: int) -> None:
        """Draw the prompts of ``batch``, with the seeds 0, 1, ..., as a row of pictures in TensorBoard."""
        pipeline = self.pipeline().to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            batch,
            num_inference_steps=20,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(batch))],
            output_type="pt",
        ).images
        row = torch.cat(list(pictures.float().cpu()), dim=2)
        self.logger.experiment.add_image(f"samples/{batch_idx}", row, self.global_step)  # type: ignore[union-attr]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay."""
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.estimated_stepping_batches), pct_start=0.02
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline with the UNet in its current state; nothing is copied."""
        return StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(self.parts["vae"]),
            text_encoder=CLIPTextModel.from_pretrained(self.parts["text_encoder"]),
            tokenizer=CLIPTokenizer.from_pretrained(self.parts["tokenizer"]),
            unet=self.unet,
            scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save_pretrained(self, output: Path) -> None:
        """Write the whole pipeline into ``output``, with the UNet in half precision to keep the files small."""
        pipeline = self.pipeline()
        pipeline.unet = UNet2DConditionModel.from_config(self.unet.config)
        pipeline.unet.load_state_dict(self.unet.state_dict())
        pipeline.unet.half()
        pipeline.save_pretrained(output)
