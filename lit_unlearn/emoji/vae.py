"""Trains the autoencoder of emoji-sd: 48 by 48 pixels to 12 by 12 latents of 6 channels and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lit_unlearn.emoji.data import DrawingDataset
from lit_unlearn.emoji.drawing import RESOLUTION


class VAETraining(L.LightningModule):
    """Trains ``AutoencoderKL`` on drawings: absolute plus squared error, and a small KL term for smooth latents.

    Args:
        block_out_channels: Channels per resolution, 48 pixels first; each except the last halves height and width.
        latent_channels: Channels of a latent.
        kl_weight: Weight of the KL term per latent value, relative to the error per pixel value.
        lr: Peak learning rate of AdamW (one-cycle schedule).
    """

    part = "vae"
    """The part of the model that it trains."""

    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        latent_channels: int = 6,
        kl_weight: float = 2e-4,
        lr: float = 2e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kl_weight, self.lr = kl_weight, lr
        levels = len(block_out_channels)
        self.vae = AutoencoderKL(
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=RESOLUTION,
            mid_block_add_attention=False,
        ).to(memory_format=torch.channels_last)  # otherwise float32 convolutions are several times slower on a CPU

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Reconstruction error through a sampled latent, plus KL."""
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"train/error": error, "train/kl": kl}, prog_bar=True)
        return error + self.kl_weight * kl

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Peak signal-to-noise ratio (dB) of the reconstructions of held-out drawings."""
        decoded = self.reconstruct(batch["images"])
        # Pictures span [-1, 1], so the peak is 2.
        psnr = 10 * torch.log10(4 / (decoded - batch["images"]).square().mean(dim=(1, 2, 3)))
        self.log("validation/psnr", psnr.mean(), prog_bar=True)
        if batch_idx == 0:
            pairs = torch.cat([batch["images"][:16], decoded[:16]]).add(1).div(2).clamp(0, 1)
            grid = torch.cat([torch.cat(list(row), dim=2) for row in pairs.split(16)], dim=1)
            self.logger.experiment.add_image("validation/drawings_above_reconstructions", grid, self.global_step)  # type: ignore[union-attr]

    def reconstruct(self, images: Tensor) -> Tensor:
        """Decode the mean latent of ``images`` (B, 3, 48, 48) in [-1, 1]."""
        latents = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        return self.vae.decode(latents).sample.float()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def save_pretrained(self, output: Path) -> None:
        """Write the autoencoder into ``output``, with the scaling factor that gives its latents unit variance."""
        data = DrawingDataset(512, "validation")
        images = torch.stack([data[i]["images"] for i in range(512)]).to(self.device)
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in images.split(64)])
        self.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.vae.save_pretrained(output)
