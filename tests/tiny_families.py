"""Random-weight pipelines in the layouts of newer families, small enough to build and sample in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from helpers import SHARED, draw_weights, original
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.diffusion.single_file.names import Namer
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.emoji.captions import vocabulary
from lit_unlearn.emoji.text_encoder import MAX_LENGTH, train_tokenizer


def clip(kind: type, tokenizer: CLIPTokenizer, seed: int, width: int, projection: int, layers: int = 3) -> Any:
    """A CLIP text encoder; prompts differ in its states by more than rounding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=projection,
        hidden_act="quick_gelu" if kind is CLIPTextModel else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = kind(config)
    draw_weights(model, seed, gain=2.0)
    return model


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind: each word of the captions is one token, other words are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = sorted(
        {f"▁{word}" for text in vocabulary() for word in text.split()} - {f"▁{letter}" for letter in letters}
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -8.0) for letter in letters] + [(word, -2.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(tokenizer: T5Tokenizer, seed: int, width: int) -> T5EncoderModel:
    """A T5 encoder with gated feed-forward layers, as version 1.1."""
    config = T5Config(
        vocab_size=len(tokenizer) + 2,  # published ones embed more than there are
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config)
    draw_weights(model, seed, gain=1.0)
    return model


def autoencoder(channels: int, **config: Any) -> AutoencoderKL:
    """An autoencoder that halves the sides."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )
    draw_weights(vae, 5, gain=3**-0.5)
    return vae


def build_sdxl(output: Path, **options: Any) -> Path:
    """Write a pipeline in the layout of Stable Diffusion XL; its pictures have 16 by 16 pixels."""
    tokenizer = train_tokenizer()
    with torch.random.fork_rng():
        first = clip(CLIPTextModel, tokenizer, 0, width=16, projection=16)
        second = clip(CLIPTextModelWithProjection, tokenizer, 1, width=24, projection=20, layers=4)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=2,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        )
        vae = autoencoder(4, scaling_factor=0.13025)
    draw_weights(unet, 2, gain=3**-0.5)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                weight.mul_(10)  # at that size a prompt would hardly matter
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(
        vae, first, second, tokenizer, train_tokenizer(), unet, scheduler, add_watermarker=False, **options
    ).save_pretrained(output)
    SHARED.add(str(output))
    return output


def build_sd3(output: Path, with_t5: bool = True, **scheduler: Any) -> Path:
    """Write a pipeline in the layout of Stable Diffusion 3; its pictures have 16 by 16 pixels."""
    tokenizer, width = train_tokenizer(), 48
    third = t5_tokenizer() if with_t5 else None
    with torch.random.fork_rng():
        encoders = [
            clip(CLIPTextModelWithProjection, tokenizer, 0, width=16, projection=16),
            clip(CLIPTextModelWithProjection, tokenizer, 1, width=24, projection=20, layers=4),
        ]
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=width,
            caption_projection_dim=32,
            pooled_projection_dim=36,
            out_channels=16,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        vae = autoencoder(
            16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        )
        encoder_3 = None if third is None else t5(third, 2, width)
    draw_weights(transformer, 3, gain=1.0)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=train_tokenizer(),
        text_encoder_3=encoder_3,  # type: ignore[arg-type]
        tokenizer_3=third,  # type: ignore[arg-type]
    ).save_pretrained(output)
    SHARED.add(str(output))
    return output


def build_flux(output: Path, guidance_embeds: bool, **scheduler: Any) -> Path:
    """Write a pipeline in the layout of FLUX.1: dev, or schnell without ``guidance_embeds``."""
    tokenizer, tokenizer_2, width = train_tokenizer(), t5_tokenizer(), 48
    with torch.random.fork_rng():
        first, second = clip(CLIPTextModel, tokenizer, 0, width=16, projection=16), t5(tokenizer_2, 2, width)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        vae = autoencoder(
            4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        )
    draw_weights(transformer, 3, gain=1.0)
    sampler = FlowMatchEulerDiscreteScheduler(**scheduler)
    FluxPipeline(sampler, vae, first, tokenizer, second, tokenizer_2, transformer).save_pretrained(output)
    SHARED.add(str(output))
    return output


def build_pixart(output: Path, alpha: bool, sample_size: int = 8, **config: Any) -> Path:
    """Write a pipeline in the layout of PixArt-Alpha, or PixArt-Sigma; its pictures have 16 by 16 pixels."""
    tokenizer, width = t5_tokenizer(), 48
    with torch.random.fork_rng():
        encoder = t5(tokenizer, 2, width)
        transformer = PixArtTransformer2DModel(
            sample_size=sample_size,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=6,
            cross_attention_dim=24,
            caption_channels=width,
            **{"out_channels": 8, **config},
        )
        vae = autoencoder(4, scaling_factor=0.18215 if alpha else 0.13025)
    draw_weights(transformer, 3, gain=1.0)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                weight.mul_(4)  # at that size a prompt would hardly matter
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    kind: Any = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    kind(tokenizer, encoder, vae, transformer, scheduler).save_pretrained(output)
    SHARED.add(str(output))
    return output


UNET, AUTOENCODER = "input_blocks.2.0.op.weight", "decoder.up.1.block"
BLOCKS = "joint_blocks.0.context_block.mlp.fc1.weight"
"""Names in a file that say how many blocks these models have."""
CLIP_PREFIX, T5_PREFIX = "text_encoders.clip_{}.transformer.", "text_encoders.t5xxl.transformer."
ORIGINAL: dict[str, dict[str, tuple[str, Namer]]] = {
    "StableDiffusionPipeline": {
        "unet": ("model.diffusion_model.", names.unet),
        "text_encoder": ("cond_stage_model.transformer.", names.clip),
    },
    "StableDiffusionXLPipeline": {
        "unet": ("model.diffusion_model.", names.unet),
        "text_encoder": ("conditioner.embedders.0.transformer.", names.clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", names.open_clip),
    },
    "StableDiffusion3Pipeline": {
        "transformer": ("model.diffusion_model.", names.stable_diffusion_3),
        "text_encoder": (CLIP_PREFIX.format("l"), names.clip),
        "text_encoder_2": (CLIP_PREFIX.format("g"), names.clip),
        "text_encoder_3": (T5_PREFIX, names.t5),
    },
    "FluxPipeline": {
        "transformer": ("model.diffusion_model.", names.flux),
        "text_encoder": (CLIP_PREFIX.format("l"), names.clip),
        "text_encoder_2": (T5_PREFIX, names.t5),
    },
}
"""Beginning of the names of each part in a published file of each family, and how they go on."""


def as_single_file(
    folder: Path,
    path: Path,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[str] | None = None,
    prefix: str | None = None,
    metadata: dict[str, str] | None = None,
    **more: Tensor,
) -> Path:
    """Write the pipeline in a folder as one file in the layout of the original code; return the file.

    Args:
        folder: A pipeline of this file.
        path: The file to write.
        dtype: Type of all weights.
        parts: The parts that the file holds; None for all.
        prefix: Beginning of the denoiser's names; None for that of a whole model.
        metadata: What the file says of itself.
        more: Further tensors.
    """
    weights = WholeModel.in_folder(folder).parts
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    made: dict[str, Tensor] = {}
    for part, (beginning, namer) in {**ORIGINAL[index], "vae": ("first_stage_model.", names.autoencoder)}.items():
        if part in weights and (parts is None or part in parts):
            start = prefix if prefix is not None and part in ("unet", "transformer") else beginning
            made |= original(weights[part], start, namer, frozenset([UNET, AUTOENCODER, BLOCKS]))
    made = {key: value.to(dtype).contiguous() for key, value in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**made, **more}, path, metadata=metadata)
    return path
