"""Pipelines of random weights in the layouts of families besides Stable Diffusion 1 and 2."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = [
    "a",
    "an",
    "the",
    "in",
    "at",
    "of",
    "with",
    "rain",
    "sunset",
    "dog",
    "cat",
    "owl",
    "soccer",
    "ball",
    "parrot",
    "toy",
]


def clip(kind: type, tokenizer: CLIPTokenizer, width: int, layers: int = 3) -> CLIPTextModel:
    """A text encoder of ``kind`` with states of ``width`` channels, and pooled vectors of as many."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def autoencoder(channels: int = 4, **config: float) -> AutoencoderKL:
    """An autoencoder from 16 by 16 pixels to 8 by 8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of whole words, which ends texts as a T5's does."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def build_sdxl(folder: Path, tokenizer: CLIPTokenizer, **options: bool) -> Path:
    """Write a pipeline in the layout of Stable Diffusion XL into ``folder``."""
    first = clip(CLIPTextModel, tokenizer, 16)
    second = clip(CLIPTextModelWithProjection, tokenizer, 24)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=2,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                weight.mul_(10)  # else a prompt would hardly matter
    StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
        **options,
    ).save_pretrained(folder)
    return folder


def build_sd3(folder: Path, tokenizer: CLIPTokenizer, with_t5: bool = True) -> Path:
    """Write a pipeline in the layout of Stable Diffusion 3 into ``folder``, without its T5 if asked."""
    words = t5_tokenizer() if with_t5 else None
    config = T5Config(
        vocab_size=len(WORDS) + 3,
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "context_embedder.weight" in name or "text_embedder.linear_1.weight" in name:
                weight.mul_(10)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 24),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(config) if with_t5 else None,
        tokenizer_3=words,
    ).save_pretrained(folder)
    return folder
