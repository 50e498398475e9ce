"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_equal, check_latents
from lit_unlearn.diffusion.noise import Flow
from lit_unlearn.diffusion.offload import call_with
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

T5_LENGTH = 256
"""Most tokens that the T5 reads, as by default in diffusers; fewer if its tokenizer has a lower limit."""


@dataclass(eq=False)
class StableDiffusion3(Pipeline):
    """Stable Diffusion 3 and 3.5: a transformer that reads text and picture as one sequence and predicts a velocity.

    Its states are those of two CLIP text encoders before their last layer, without the final norm, side by side and
    padded with zeros to the width of the T5's; the T5's states follow along the sequence. Without a T5 there are zeros
    in their place, as in diffusers. The last layers of the CLIPs reach only the pooled vector.

    Attributes:
        tokenizer: Turns prompts into ``input_ids`` of the first encoder.
        text_encoder: ``input_ids`` (B, L) to the first D1 channels of the states and P1 numbers of the pooled vectors.
        tokenizer_2: Turns prompts into ``input_ids`` of the second encoder.
        text_encoder_2: ``input_ids`` (B, L) to the next D2 channels and P2 numbers.
        transformer: Predicts the velocity (B, C, H, W) from latents, timesteps, states (B, L + 256, D) and pooled
            vectors (B, P1 + P2).
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
        tokenizer_3: Turns prompts into ``input_ids`` of the T5; None without one.
        text_encoder_3: ``input_ids`` (B, 256) to states (B, 256, D); None without one.
        clip_skip: How many layers earlier the states of both CLIPs are read; None for none.
    """

    index_class: ClassVar[str] = "StableDiffusion3Pipeline"
    title: ClassVar[str] = "Stable Diffusion 3 and 3.5"
    form: ClassVar[str] = (
        "two CLIPTextModelWithProjection, perhaps a T5EncoderModel, an SD3Transformer2DModel and an AutoencoderKL"
    )
    declared: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder"),
        "text_encoder": Part(("CLIPTextModelWithProjection",)),
        "tokenizer_2": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder_2"),
        "text_encoder_2": Part(("CLIPTextModelWithProjection",)),
        "tokenizer_3": Part(
            ("T5Tokenizer", "T5TokenizerFast"), optional=True, encoder="text_encoder_3", length=T5_LENGTH
        ),
        "text_encoder_3": Part(("T5EncoderModel",), optional=True),
        "transformer": Part(("SD3Transformer2DModel",)),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }
    denoiser_part: ClassVar[str] = "transformer"
    cross_attention: ClassVar[bool] = False
    begins: ClassVar[bool] = False
    read_after: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "text_encoder": {"tokens": -2, "pooled": -1},
        "text_encoder_2": {"tokens": -2, "pooled": -1},
        "text_encoder_3": {"tokens": -1},
    }
    skips: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
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
    clip_skip: int | None = None

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        first, second, transformer = configs["text_encoder"], configs["text_encoder_2"], configs["transformer"]
        out = transformer.in_channels if transformer.out_channels is None else transformer.out_channels
        channels = {"transformer in_channels": transformer.in_channels, "transformer out_channels": out}
        check_latents(channels, configs["vae"], model)
        pooled = first.projection_dim + second.projection_dim
        check_equal(
            {
                "transformer pooled_projection_dim": transformer.pooled_projection_dim,
                "projection_dim of text_encoder and text_encoder_2 together": pooled,
            },
            model,
        )
        width = transformer.joint_attention_dim
        if (third := configs.get("text_encoder_3")) is not None:
            check_equal({"transformer joint_attention_dim": width, "text_encoder_3 d_model": third.d_model}, model)
        if (narrow := first.hidden_size + second.hidden_size) > width:
            raise ValueError(
                f"model={model!r} has transformer joint_attention_dim={width}, and hidden_size of text_encoder and "
                f"text_encoder_2 together is {narrow}, which must not be larger: take all parts from one pipeline."
            )
        if configs["vae"].shift_factor is None:
            raise ValueError(f"model={model!r}: vae/config.json has no shift_factor: copy the part again.")
        size, patch = transformer.sample_size, transformer.patch_size
        if not isinstance(size, int) or size < 1 or size % patch:
            raise ValueError(
                f"model={model!r}: transformer/config.json has sample_size={size!r}: give the side of the latents, a "
                f"multiple of patch_size={patch}."
            )

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> Flow:
        """See ``Pipeline.process``."""
        return Flow(scheduler, (denoiser_config["sample_size"] // denoiser_config["patch_size"]) ** 2)

    @classmethod
    def unread(cls, names: Sequence[str]) -> list[str]:
        """See ``Pipeline.unread``: the queries of the text in the last block, whose text leads nowhere."""
        numbers = {name: re.match(r"transformer\.transformer_blocks\.(\d+)\.", name) for name in names}
        last = max((int(number[1]) for number in numbers.values() if number), default=-1)
        ends = tuple(f"transformer_blocks.{last}.attn.{part}." for part in ("add_q_proj", "norm_added_q"))
        return [name for name in names if any(end in name for end in ends)]

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        length, layer = self.tokenizer.model_max_length, -2 - (self.clip_skip or 0)
        clips = (
            TextEncoder("text_encoder", self.text_encoder, self.tokenizer, layer, length),
            TextEncoder("text_encoder_2", self.text_encoder_2, self.tokenizer_2, layer, length),
        )
        if self.text_encoder_3 is None or self.tokenizer_3 is None:
            return clips
        length = min(T5_LENGTH, self.tokenizer_3.model_max_length)
        return *clips, TextEncoder("text_encoder_3", self.text_encoder_3, self.tokenizer_3, positions=length)

    @property
    def token_order(self) -> tuple[int, ...]:
        """See ``Pipeline.token_order``: the CLIPs, then the T5."""
        return (0,) if self.text_encoder_3 is None else (0, 2)

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """See ``Pipeline.first_inputs``; zeros in place of a T5 are no input of any text."""
        assert condition.pooled is not None
        states = condition.states if self.text_encoder_3 is not None else condition.states[:, : self.texts[0].length]
        return {"tokens": states, "pooled": condition.pooled.unsqueeze(1)}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``; all blocks work on the same patches."""
        return (self.transformer.config.sample_size // self.transformer.config.patch_size) ** 2

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``."""
        (first, pooled), (second, pooled_2), *rest = [
            text.read(ids) for text, ids in zip(self.texts, tokens.ids, strict=True)
        ]
        clips = torch.cat([first, second], dim=-1)
        width = self.transformer.config.joint_attention_dim
        third = rest[0][0] if rest else clips.new_zeros(len(clips), T5_LENGTH, width)
        assert pooled is not None and pooled_2 is not None
        states = torch.cat([pad(clips, (0, width - clips.shape[-1])), third], dim=1)
        return Condition(states, torch.cat([pooled, pooled_2], dim=-1))

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``."""
        given = (x_t, condition.states, condition.pooled, timesteps.expand(len(x_t)))
        if values is None:
            return self.transformer(*given).sample
        return call_with(self.transformer, values, given).sample

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures, self.vae.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents, self.vae.config.shift_factor)

    def to_diffusers(self) -> StableDiffusion3Pipeline:
        """The same parts as a pipeline of diffusers."""
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer_3,
        )


__all__ = ["StableDiffusion3"]
