"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_conditions, check_latents, check_sides
from lit_unlearn.diffusion.noise import DDPM
from lit_unlearn.diffusion.offload import call_with
from lit_unlearn.diffusion.parameters import num_places, sides
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

CONDITIONS = {
    "time_cond_proj_dim": "the guidance scale (it was distilled for few steps)",
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "addition_embed_type": "sizes, pictures or pooled text (as SDXL)",
    "encoder_hid_dim": "states of another width",
    "encoder_hid_dim_type": "states of another kind",
}
"""Fields of a UNet's configuration for inputs besides latents, timesteps and text, with the name of the input."""


@dataclass(eq=False)
class StableDiffusion(Pipeline):
    """Stable Diffusion 1.x and 2.x: a UNet that attends to one CLIP text encoder and predicts noise or velocity.

    Attributes:
        tokenizer: Turns prompts into ``input_ids``.
        text_encoder: ``input_ids`` (B, L) to ``encoder_hidden_states`` (B, L, D).
        unet: Predicts noise or velocity (B, C, H, W) from latents, timesteps and ``encoder_hidden_states``.
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
        clip_skip: How many layers earlier the encoder is read, before the final norm; None for none.
    """

    index_class: ClassVar[str] = "StableDiffusionPipeline"
    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    form: ClassVar[str] = "a single CLIPTextModel, a UNet2DConditionModel and an AutoencoderKL"
    declared: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder"),
        "text_encoder": Part(("CLIPTextModel",)),
        "unet": Part(("UNet2DConditionModel",)),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }
    denoiser_part: ClassVar[str] = "unet"
    read_after: ClassVar[Mapping[str, Mapping[str, int]]] = {"text_encoder": {"tokens": -1}}
    skips: ClassVar[tuple[str, ...]] = ("text_encoder",)
    mended: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scheduler": ("steps_offset", "clip_sample"),
        "unet": ("sample_size",),
    }

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    clip_skip: int | None = None

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        text, unet, vae = configs["text_encoder"], configs["unet"], configs["vae"]
        check_conditions(unet, CONDITIONS, model)
        check_latents({"unet in_channels": unet.in_channels, "unet out_channels": unet.out_channels}, vae, model)
        widths = unet.cross_attention_dim
        if set(widths if isinstance(widths, list | tuple) else [widths]) != {text.hidden_size}:
            raise ValueError(
                f"model={model!r} has unet cross_attention_dim={widths} and text_encoder hidden_size="
                f"{text.hidden_size}, which must be equal: take both from one pipeline."
            )
        check_sides("unet", unet.sample_size, model)

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> DDPM:
        """See ``Pipeline.process``."""
        return DDPM(scheduler)

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        layer = None if self.clip_skip is None else -1 - self.clip_skip
        return (TextEncoder("text_encoder", self.text_encoder, self.tokenizer, layer, normed=layer is not None),)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        return self.unet.config.in_channels, *sides(self.unet.config)

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``."""
        return num_places(self.unet.config, name)

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``."""
        return Condition(self.texts[0].states(tokens.ids[0]))

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``."""
        given = (x_t, timesteps, condition.states)
        if values is None:
            return self.unet(*given).sample
        return call_with(self.unet, values, given).sample

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents)

    def to_diffusers(self) -> StableDiffusionPipeline:
        """The same parts as a pipeline of diffusers, which corrects configurations of 2022 in place."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


__all__ = ["StableDiffusion"]
