"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_equal, check_latents, check_sides
from lit_unlearn.diffusion.noise import Flow
from lit_unlearn.diffusion.parameters import sides
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

T5_LENGTH = 256
"""Most positions that the T5 reads, ``max_sequence_length`` of diffusers' pipeline by default."""


@dataclass(eq=False)
class StableDiffusion3(Pipeline):
    """Stable Diffusion 3 and 3.5: a transformer with joint attention over a picture and three text encoders' states.

    Both CLIPs are read before their last layer, side by side, and padded with zeros to the width of the T5, whose
    states follow along the sequence; without a T5 zeros take their place. The pooled vectors of both CLIPs, side by
    side, are added to the timestep's. So the last layer of a CLIP acts on its pooled vector only.

    Attributes:
        tokenizer: Turns prompts into ``input_ids`` of the first CLIP.
        text_encoder: ``input_ids`` (B, L) to the first D1 channels of the first L states, and pooled vectors (B, P1).
        tokenizer_2: Turns prompts into ``input_ids`` of the second CLIP.
        text_encoder_2: The same for the next D2 channels, with pooled vectors (B, P2).
        transformer: Predicts the velocity (B, C, H, W) from latents, timesteps, states (B, L + L3, D3) and pooled
            vectors (B, P1 + P2).
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
        tokenizer_3: Turns prompts into ``input_ids`` of the T5; None without one.
        text_encoder_3: ``input_ids`` (B, L3) to states (B, L3, D3); None if the folder has no T5.
    """

    index_class: ClassVar[str] = "StableDiffusion3Pipeline"
    title: ClassVar[str] = "Stable Diffusion 3 and 3.5"
    form: ClassVar[str] = (
        "two CLIPTextModelWithProjection, a T5EncoderModel (which may be absent), a SD3Transformer2DModel and an "
        "AutoencoderKL"
    )
    declared: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder"),
        "text_encoder": Part(("CLIPTextModelWithProjection",)),
        "tokenizer_2": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder_2"),
        "text_encoder_2": Part(("CLIPTextModelWithProjection",)),
        "tokenizer_3": Part(("T5Tokenizer", "T5TokenizerFast"), True, encoder="text_encoder_3", length=T5_LENGTH),
        "text_encoder_3": Part(("T5EncoderModel",), True),
        "transformer": Part(("SD3Transformer2DModel",)),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }
    denoiser_part: ClassVar[str] = "transformer"
    flow: ClassVar[bool] = True

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    tokenizer_3: T5Tokenizer | None = None
    text_encoder_3: T5EncoderModel | None = None

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        first, second, transformer, vae = (configs[p] for p in ("text_encoder", "text_encoder_2", "transformer", "vae"))
        channels = {"transformer in_channels": transformer.in_channels}
        channels["transformer out_channels"] = transformer.out_channels or transformer.in_channels
        check_latents(channels, vae, model)
        pooled = first.projection_dim + second.projection_dim
        what = "projection_dim of both CLIPs together"
        check_equal({"transformer pooled_projection_dim": transformer.pooled_projection_dim, what: pooled}, model)
        width = transformer.joint_attention_dim
        if (t5 := configs.get("text_encoder_3")) is not None:
            check_equal({"transformer joint_attention_dim": width, "text_encoder_3 d_model": t5.d_model}, model)
        if (both := first.hidden_size + second.hidden_size) > width:
            raise ValueError(
                f"model={model!r} has hidden_size={both} of both CLIPs together, which is more than transformer "
                f"joint_attention_dim={width}: take all parts from one pipeline."
            )
        check_sides("transformer", transformer.sample_size, model)

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> Flow:
        """See ``Pipeline.process``."""
        height, width = sides(denoiser_config)
        patch = int(denoiser_config["patch_size"])
        return Flow(scheduler, (height // patch) * (width // patch))

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        clips = (
            TextEncoder("text_encoder", self.text_encoder, self.tokenizer, layer=-2),
            TextEncoder("text_encoder_2", self.text_encoder_2, self.tokenizer_2, layer=-2),
        )
        if self.text_encoder_3 is None or self.tokenizer_3 is None:
            return clips
        length = min(T5_LENGTH, int(self.tokenizer_3.model_max_length))
        return (*clips, TextEncoder("text_encoder_3", self.text_encoder_3, self.tokenizer_3, positions=length))

    @property
    def token_order(self) -> tuple[int, ...]:
        """See ``Pipeline.token_order``: the CLIPs share positions, and those of the T5 follow."""
        return (0,) if self.text_encoder_3 is None else (0, 2)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        return self.transformer.config.in_channels, *sides(self.transformer.config)

    @property
    def picture_size(self) -> tuple[int, int]:
        """See ``Pipeline.picture_size``."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = sides(self.transformer.config)
        return height * factor, width * factor

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``: the patches, in every block."""
        return self.process(self.scheduler, self.transformer.config).num_patches

    def with_sampler(self, kind: Literal["model", "ddim"]) -> StableDiffusion3:  # type: ignore[override]
        """See ``Pipeline.with_sampler``."""
        self.noise.with_sampler(kind)
        return self

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``."""
        read = [text.read(ids) for text, ids in zip(self.texts, tokens.ids, strict=True)]
        clips = torch.cat([states for states, _ in read[:2]], dim=-1)
        width = self.transformer.config.joint_attention_dim
        others = read[2][0] if len(read) > 2 else clips.new_zeros(len(clips), T5_LENGTH, width)
        states = torch.cat([F.pad(clips, (0, width - clips.shape[-1])), others.to(clips)], dim=1)
        return Condition(states, torch.cat([pooled for _, pooled in read[:2] if pooled is not None], dim=-1))

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """See ``Pipeline.first_inputs``; without a T5 the zeros in its place are no input of any text."""
        assert condition.pooled is not None
        states = condition.states if self.text_encoder_3 is not None else condition.states[:, : self.texts[0].length]
        return {"tokens": states, "pooled": condition.pooled.unsqueeze(1)}

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``."""
        given = {
            "timestep": timesteps.expand(len(x_t)),
            "encoder_hidden_states": condition.states,
            "pooled_projections": condition.pooled,
        }
        if values is None:
            return self.transformer(x_t, **given).sample
        return functional_call(self.transformer, dict(values), (x_t,), given).sample

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures, self.vae.config.shift_factor or 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents, self.vae.config.shift_factor or 0.0)

    def to_diffusers(self) -> StableDiffusion3Pipeline:
        """The same parts as a pipeline of diffusers."""
        from diffusers import StableDiffusion3Pipeline

        names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
        parts = {name: getattr(self, name) for name in (*names, "transformer", "vae", "scheduler")}
        return StableDiffusion3Pipeline(**parts)


__all__ = ["StableDiffusion3"]
