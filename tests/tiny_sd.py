"""Random-weight pipelines in the layout of Stable Diffusion, small enough to build, train and sample in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from helpers import SHARED, draw_weights
from lit_unlearn.emoji.text_encoder import MAX_LENGTH, train_tokenizer

NUM_TEXT_LAYERS = 3
HIDDEN, INTERMEDIATE = 32, 128


def build_sd(output: Path, seed: int, hidden_act: str, prediction_type: str, pad_token: str | None = None) -> Path:
    """Write a pipeline of random weights into ``output``; its pictures have 16 by 16 pixels."""
    tokenizer = train_tokenizer()
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    with torch.random.fork_rng():  # the libraries draw weights too
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=NUM_TEXT_LAYERS,
                num_attention_heads=2,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=HIDDEN,
                hidden_act=hidden_act,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=HIDDEN,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    draw_weights(text_encoder, seed, gain=2.0)  # prompts must differ in the states by more than rounding
    draw_weights(unet, seed, gain=3**-0.5)  # the spread of PyTorch's own, here and below
    draw_weights(vae, seed, gain=3**-0.5)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                weight.mul_(10)  # at that size a prompt would hardly matter
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output)
    SHARED.add(str(output))
    return output
