"""Stable Diffusion XL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_conditions, check_equal, check_latents, check_sides
from lit_unlearn.diffusion.noise import DDPM
from lit_unlearn.diffusion.offload import call_with
from lit_unlearn.diffusion.parameters import num_places, sides
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CONDITIONS = {
    "time_cond_proj_dim": "the guidance scale (it was distilled for few steps)",
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "encoder_hid_dim": "states of another width",
    "encoder_hid_dim_type": "states of another kind",
}
"""Fields of a UNet's configuration for inputs that are not given to it, with the name of the input."""
NUM_SIZES = 6
"""Numbers that the UNet is told of a picture: original size, corner of the crop, target size, two each."""


@dataclass(eq=False)
class StableDiffusionXL(Pipeline):
    """Stable Diffusion XL: a UNet that attends to two CLIP text encoders and also gets a pooled vector and sizes.

    Both encoders are read before their last layer and without the final norm. So the last layer of ``text_encoder``
    acts on nothing, and that of ``text_encoder_2`` only on the pooled vector. The sizes are those of a picture of the
    model's own size that is not cropped, as by default in diffusers.

    Attributes:
        tokenizer: Turns prompts into ``input_ids`` of the first encoder.
        text_encoder: ``input_ids`` (B, L) to the first D1 of the D1 + D2 channels of the states.
        tokenizer_2: Turns prompts into ``input_ids`` of the second encoder.
        text_encoder_2: ``input_ids`` (B, L) to the other channels, and to the pooled vectors (B, P).
        unet: Predicts noise or velocity (B, C, H, W) from latents, timesteps, states (B, L, D1 + D2), pooled vectors
            (B, P) and sizes (B, 6).
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
        force_zeros_for_empty_prompt: Whether guidance leads away from a condition of zeros, and not from the empty
            prompt's.
        clip_skip: How many layers earlier the states of both encoders are read; None for none.
    """

    index_class: ClassVar[str] = "StableDiffusionXLPipeline"
    title: ClassVar[str] = "Stable Diffusion XL"
    form: ClassVar[str] = "a CLIPTextModel, a CLIPTextModelWithProjection, a UNet2DConditionModel and an AutoencoderKL"
    declared: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder"),
        "text_encoder": Part(("CLIPTextModel",)),
        "tokenizer_2": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder_2"),
        "text_encoder_2": Part(("CLIPTextModelWithProjection",)),
        "unet": Part(("UNet2DConditionModel",)),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }
    denoiser_part: ClassVar[str] = "unet"
    read_after: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "text_encoder": {"tokens": -2},
        "text_encoder_2": {"tokens": -2, "pooled": -1},
    }
    skips: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    force_zeros_for_empty_prompt: bool = True
    clip_skip: int | None = None

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        first, second, unet, vae = (configs[part] for part in ("text_encoder", "text_encoder_2", "unet", "vae"))
        check_conditions(unet, CONDITIONS, model)
        if unet.addition_embed_type != "text_time":
            raise ValueError(
                f"model={model!r}: unet/config.json has addition_embed_type={unet.addition_embed_type!r}, and "
                "Stable Diffusion XL has 'text_time': copy the part again, with its config.json."
            )
        check_latents({"unet in_channels": unet.in_channels, "unet out_channels": unet.out_channels}, vae, model)
        widths = unet.cross_attention_dim
        width = first.hidden_size + second.hidden_size
        for place in widths if isinstance(widths, list | tuple) else [widths]:
            check_equal({"unet cross_attention_dim": place, "hidden_size of both text encoders together": width}, model)
        inputs = second.projection_dim + NUM_SIZES * unet.addition_time_embed_dim
        check_equal(
            {
                "unet projection_class_embeddings_input_dim": unet.projection_class_embeddings_input_dim,
                "text_encoder_2 projection_dim with six times unet addition_time_embed_dim": inputs,
            },
            model,
        )
        check_sides("unet", unet.sample_size, model)

    @classmethod
    def options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Pipeline.options``."""
        return {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True) is not False}

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> DDPM:
        """See ``Pipeline.process``."""
        return DDPM(scheduler)

    @classmethod
    def unread(cls, names: Sequence[str]) -> list[str]:
        """See ``Pipeline.unread``: the last layer of ``text_encoder``, and the norm behind it."""
        numbers = {name: re.match(r"text_encoder\.encoder\.layers\.(\d+)\.", name) for name in names}
        last = max((int(number[1]) for number in numbers.values() if number), default=-1)
        return [
            name
            for name, number in numbers.items()
            if name.startswith("text_encoder.final_layer_norm.") or (number and int(number[1]) == last)
        ]

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        layer = -2 - (self.clip_skip or 0)
        return (
            TextEncoder("text_encoder", self.text_encoder, self.tokenizer, layer),
            TextEncoder("text_encoder_2", self.text_encoder_2, self.tokenizer_2, layer),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        return self.unet.config.in_channels, *sides(self.unet.config)

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``."""
        return num_places(self.unet.config, name)

    def settings(self) -> dict[str, Any]:
        """See ``Pipeline.settings``."""
        return {**super().settings(), "force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``."""
        read = [text.read(ids) for text, ids in zip(self.texts, tokens.ids, strict=True)]
        return Condition(torch.cat([states for states, _ in read], dim=-1), read[1][1])

    @property
    def leads_from_empty(self) -> bool:
        """See ``Pipeline.leads_from_empty``; not from zeros."""
        return not self.force_zeros_for_empty_prompt

    def unconditional(self) -> Condition:
        """See ``Pipeline.unconditional``; zeros if the model says so."""
        if not self.force_zeros_for_empty_prompt:
            return super().unconditional()
        configs: tuple[Any, Any] = self.text_encoder.config, self.text_encoder_2.config
        options: dict[str, Any] = {"device": self.device, "dtype": self.text_encoder_2.dtype}
        states = torch.zeros(1, self.texts[0].length, sum(config.hidden_size for config in configs), **options)
        return Condition(states, torch.zeros(1, configs[1].projection_dim, **options))

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """See ``Pipeline.first_inputs``; sizes follow the pooled vectors."""
        assert condition.pooled is not None
        sizes = self.unet.add_time_proj(self._sizes(condition).flatten()).view(len(condition), -1)
        pooled = torch.cat([condition.pooled, sizes.to(condition.pooled)], dim=-1)
        return {"tokens": condition.states, "pooled": pooled.unsqueeze(1)}

    def _sizes(self, condition: Condition) -> Tensor:
        """What the UNet is told of the sizes of pictures, (B, 6)."""
        size, states = self.picture_size, condition.states
        return torch.tensor([*size, 0, 0, *size], dtype=states.dtype, device=states.device).expand(len(condition), -1)

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``."""
        added = {"text_embeds": condition.pooled, "time_ids": self._sizes(condition)}
        given, options = (x_t, timesteps, condition.states), {"added_cond_kwargs": added}
        if values is None:
            return self.unet(*given, **options).sample
        return call_with(self.unet, values, given, options).sample

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``; float16 is not precise enough for some autoencoders, which say so."""
        with self._upcast():
            return self._scaled(encode_pictures(self.vae, pictures)).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        with self._upcast():
            return decode_latents(self.vae, self._scaled(latents, back=True))

    def _scaled(self, latents: Tensor, back: bool = False) -> Tensor:
        """Latents standardised by the autoencoder's statistics for each channel, if it has some, or not (``back``)."""
        mean, std = self.vae.config.latents_mean, self.vae.config.latents_std
        if mean is None or std is None:
            return latents
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        scale = self.vae.config.scaling_factor
        return latents * std + mean * scale if back else (latents - mean * scale) / std

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """Within the block, the autoencoder computes in float32 if it must (``force_upcast``)."""
        if self.vae.dtype != torch.float16 or not self.vae.config.force_upcast:
            yield
            return
        torch.nn.Module.to(self.vae, torch.float32)
        try:
            yield
        finally:
            torch.nn.Module.to(self.vae, torch.float16)

    def to_diffusers(self) -> StableDiffusionXLPipeline:
        """The same parts as a pipeline of diffusers."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self.scheduler,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )


__all__ = ["StableDiffusionXL"]
