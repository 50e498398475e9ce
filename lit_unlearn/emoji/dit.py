"""Trains the transformer of emoji-dit on latents of drawings and states of their captions, and writes the pipeline.

Autoencoder and text encoders are frozen, so their outputs are computed once and kept in memory; a training step runs
only the transformer.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import PictureItem
from lit_unlearn.diffusion.source import EMBEDDED
from lit_unlearn.emoji.dit_text import ENCODERS, TOKENIZERS
from lit_unlearn.emoji.drawing import RESOLUTION
from lit_unlearn.emoji.parts import trained_part
from lit_unlearn.judges.base import judge_questions
from lit_unlearn.judges.emoji import EmojiJudge
from lit_unlearn.system.files import copy_into


class DiTTraining(L.LightningModule):
    """Trains an ``SD3Transformer2DModel`` by flow matching (Esser et al., 2024) and assembles the pipeline.

    ``x_t = (1 - sigma) x_0 + sigma noise`` with ``sigma = sigmoid(u)`` and u normal; the transformer predicts
    ``noise - x_0``.

    Args:
        text_encoders: Folder of a run of ``emoji/dit_text.yaml``, which has trained text encoders and tokenizers; null
            takes those of ``start``.
        start: Folder of a pipeline or ``emoji-dit``; its transformer is trained further, with its text encoders and
            autoencoder. Null starts from random weights.
        model: Folder of a pipeline or ``emoji-sd``; its autoencoder is used, unless ``start`` is given.
        vae: Folder of a run that has trained the autoencoder; null takes that of ``model``, or of ``start``.
        num_layers: Blocks of the transformer.
        num_heads: Attention heads.
        attention_head_dim: Channels of a head.
        patch_size: Side of a patch, in latents.
        lr: Peak learning rate of AdamW, after a warm-up of 100 steps and before a cosine decay to zero.
        minutes: Time that the fit may take, over all its pieces: the learning rate decays by time if that is ahead of
            the steps, and the fit ends when the time is over. Null means that only the steps count; only then do two
            fits have the same result.
        logit_mean: Mean of u. Stable Diffusion 3 has 0; less means less noise, where small latents have their details.
        logit_std: Standard deviation of u.
        num_inference_steps: Steps of the sampler for the pictures that are judged.
        guidance_scale: Strength of classifier-free guidance for the pictures that are judged.

    Raises:
        ValueError: A run is missing or has not trained that part, or the transformer of ``start`` has another size; or
            ``minutes`` is not positive.
    """

    def __init__(
        self,
        text_encoders: str | None = None,
        start: str | None = None,
        model: str = "emoji-sd",
        vae: str | None = None,
        num_layers: int = 6,
        num_heads: int = 4,
        attention_head_dim: int = 32,
        patch_size: int = 2,
        lr: float = 2e-3,
        minutes: float | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        num_inference_steps: int = 10,
        guidance_scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if text_encoders is None and start is None:
            raise ValueError("text_encoders is missing: give the folder of a run of emoji/dit_text.yaml, or start.")
        if text_encoders is not None and start is not None:
            raise ValueError(
                f"text_encoders={text_encoders!r} beside start={start!r}: the transformer reads the text encoders that "
                "it was trained with, so give one of the two."
            )
        if start is not None and model != EMBEDDED:
            raise ValueError(
                f"model={model!r} beside start={start!r}, which has an autoencoder of its own: omit model."
            )
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes={minutes} must be positive, or null for no limit.")
        self.lr, self.minutes, self.logit_mean, self.logit_std = lr, minutes, logit_mean, logit_std
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.seconds = 0.0
        self.out_of_time = False
        self._since: float | None = None
        self._judge: EmojiJudge | None = None
        self._shown: dict[str, list[float]] = defaultdict(list)
        origin, field = (model, "model") if start is None else (start, "start")
        self.parts = {part: trained_part(part, text_encoders, origin, field) for part in (*ENCODERS, *TOKENIZERS)}
        self.parts["vae"] = trained_part("vae", vae, origin, field)
        vae_config = AutoencoderKL.load_config(self.parts["vae"])
        clips = [CLIPTextConfig.from_pretrained(self.parts[name]) for name in ENCODERS[:2]]
        self.t5_length = int(T5Tokenizer.from_pretrained(self.parts["tokenizer_3"]).model_max_length)
        sample_size = RESOLUTION // 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=vae_config["latent_channels"],
            out_channels=vae_config["latent_channels"],
            num_layers=num_layers,
            num_attention_heads=num_heads,
            attention_head_dim=attention_head_dim,
            joint_attention_dim=T5Config.from_pretrained(self.parts["text_encoder_3"]).d_model,
            caption_projection_dim=num_heads * attention_head_dim,
            pooled_projection_dim=sum(int(config.projection_dim or 0) for config in clips),
            pos_embed_max_size=sample_size,
            qk_norm="rms_norm",
        )
        if start is not None:
            self._start_from(start)

    def _start_from(self, start: str) -> None:
        """Take the weights of the transformer of ``start``."""
        folder = trained_part("transformer", None, start, "start")
        found = {**self.transformer.config, **SD3Transformer2DModel.load_config(folder)}
        for field, own in self.transformer.config.items():
            other = tuple(found[field]) if isinstance(found[field], list) else found[field]  # JSON has no tuples
            if not field.startswith("_") and other != own:
                raise ValueError(
                    f"start={start!r} has a transformer with {field}={found[field]}, and this one has {own}: set the "
                    "arguments of the model to those that it was trained with, or leave start out."
                )
        self.transformer.load_state_dict(load_file(folder / SAFETENSORS_WEIGHTS_NAME))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the predicted velocity."""
        latents, noise = batch["latents"], batch["noise"]
        sigma = torch.sigmoid(batch["u"] * self.logit_std + self.logit_mean)
        x_t = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        # PyTorch's fused attention in bfloat16 is slower on processors than its plain one.
        with sdpa_kernel(SDPBackend.MATH):
            velocity = self.transformer(x_t, batch["states"], batch["pooled"], sigma * 1000).sample
        loss = F.mse_loss(velocity.float(), noise - latents)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    # ------------------------------------------------------------------------------------------------------------ time

    def progress(self, step: int) -> float:
        """The share of the fit that is done at ``step``, by steps or by time, whichever is further."""
        steps = step / int(self.trainer.estimated_stepping_batches)
        return steps if self.minutes is None else max(steps, self.seconds / (60 * self.minutes))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note when the step began; encoding and drawing do not count."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the time, and end the fit when it is over."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        if self.minutes is not None and self.seconds >= 60 * self.minutes:
            self.out_of_time = self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the time that the fit has taken."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.seconds = float(checkpoint.get("seconds", 0.0))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay."""
        optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=1e-2)

        def factor(step: int) -> float:
            return min((step + 1) / 100, 1.0) * (1 + math.cos(math.pi * min(self.progress(step), 1.0))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -------------------------------------------------------------------------------------------------------- pictures

    def on_validation_epoch_start(self) -> None:
        """Forget the verdicts of the epoch before."""
        self._shown = defaultdict(list)

    def validation_step(self, batch: list[PictureItem], batch_idx: int) -> None:
        """Draw the prompts of ``batch`` and ask the judge whether each picture shows its concept."""
        self._judge = self._judge or EmojiJudge()
        pipeline = self.pipeline().to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            pictures = draw(
                pipeline,
                [item.prompt for item in batch],
                [item.seed for item in batch],
                self.num_inference_steps,
                self.guidance_scale,
            )
        answers = judge_questions(self._judge, pictures, [item.question for item in batch])
        concepts = load_concept_set("emoji20")
        for item, answer in zip(batch, answers.tolist(), strict=True):
            kind = "direct" if item.prompt_index < concepts.counts.direct else "indirect"
            for key in (kind, f"concept/{list(concepts.concepts)[item.concept_index]}"):
                self._shown[key].append(float(answer >= 0.5))
        row = torch.cat(list(pictures[:16]), dim=2)
        self.logger.experiment.add_image(f"samples/{batch_idx}", row, self.global_step)  # type: ignore[union-attr]

    def on_validation_epoch_end(self) -> None:
        """Log the share of pictures that show their concept, of direct and indirect prompts and of each concept."""
        for key, verdicts in self._shown.items():
            self.log(f"validation/{key}", sum(verdicts) / len(verdicts), prog_bar=key in ("direct", "indirect"))

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline with the transformer in its current state; the transformer is not copied."""
        vae = AutoencoderKL.from_pretrained(self.parts["vae"]).eval()
        if vae.config.shift_factor is None:  # the pipeline adds it
            vae.register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae,
            text_encoder=CLIPTextModelWithProjection.from_pretrained(self.parts["text_encoder"]).eval(),
            tokenizer=CLIPTokenizer.from_pretrained(self.parts["tokenizer"]),
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(self.parts["text_encoder_2"]).eval(),
            tokenizer_2=CLIPTokenizer.from_pretrained(self.parts["tokenizer_2"]),
            text_encoder_3=T5EncoderModel.from_pretrained(self.parts["text_encoder_3"]).eval(),
            tokenizer_3=T5Tokenizer.from_pretrained(self.parts["tokenizer_3"]),
        )

    def save_pretrained(self, output: Path) -> None:
        """Write the whole pipeline into ``output``; transformer and text encoders in half precision, to be small."""
        pipeline = self.pipeline()
        pipeline.transformer = SD3Transformer2DModel.from_config(self.transformer.config)
        pipeline.transformer.load_state_dict(self.transformer.state_dict())
        pipeline.transformer.half()
        pipeline.save_pretrained(output)
        for name in ENCODERS:  # as they were written: the weights in half precision
            copy_into(Path(self.parts[name]), output / name)


def draw(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    max_sequence_length: int | None = None,
) -> Tensor:
    """Draw ``prompts`` with diffusers' own pipeline: pictures (B, 3, H, W) in [0, 1], float32.

    Args:
        pipeline: Whose ``set_progress_bar_config`` is changed: no bar is shown.
        prompts: B prompts.
        seeds: B seeds.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of classifier-free guidance.
        max_sequence_length: Positions of T5; None means as many as its tokenizer says, with which the transformer was
            trained, and not the 256 of the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=max_sequence_length or int(pipeline.tokenizer_3.model_max_length),
        output_type="pt",
    ).images
    return pictures.float().cpu()
