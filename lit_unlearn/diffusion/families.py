"""The families of pipelines. A new family needs a class here and a test file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Generator, Tensor, nn
from torch.func import functional_call

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.noise import DDPM
from lit_unlearn.diffusion.parameters import num_places, sides
from lit_unlearn.diffusion.pipeline import Change, Conditions, Pipeline
from lit_unlearn.diffusion.sampling import DenoisingStep, decode_latents, denoise, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
"""Fields of a text encoder's configuration that change its output without changing its weights."""


@dataclass(eq=False)
class StableDiffusion(Pipeline):
    """Stable Diffusion 1.x and 2.x: a UNet that attends to one CLIP text encoder and predicts noise or velocity.

    Attributes:
        tokenizer: Turns prompts into ``input_ids``.
        text_encoder: ``input_ids`` (B, L) to ``encoder_hidden_states`` (B, L, D).
        unet: Predicts noise or velocity (B, C, H, W) from latents, timesteps and ``encoder_hidden_states``.
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
    """

    denoiser_part: ClassVar[str] = "unet"

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See ``Pipeline.parts``."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        return (TextEncoder("text_encoder", self.text_encoder, self.tokenizer),)

    @property
    def noise(self) -> DDPM:
        """See ``Pipeline.noise``."""
        return DDPM(self.scheduler)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        return self.unet.config.in_channels, *sides(self.unet.config)

    @property
    def picture_size(self) -> tuple[int, int]:
        """See ``Pipeline.picture_size``."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = sides(self.unet.config)
        return height * factor, width * factor

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``."""
        return num_places(self.unet.config, name)

    def settings(self) -> dict[str, Any]:
        """See ``Pipeline.settings``."""
        return {
            "unet": _plain(self.unet.config),
            "text_encoder": {name: str(getattr(self.text_encoder.config, name)) for name in TEXT_SETTINGS},
            "vae": _plain(self.vae.config),
            "scheduler": _plain(self.scheduler.config),
            "latents": list(self.latent_shape),
        }

    def with_sampler(self, kind: Literal["model", "ddim"]) -> StableDiffusion:  # type: ignore[override]
        """See ``Pipeline.with_sampler``."""
        return replace(self, scheduler=self.noise.with_sampler(kind).scheduler)

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
        return functional_call(self.unet, dict(values), given).sample

    def chain(
        self,
        conditions: Conditions,
        noise: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        stop: int | None = None,
        generators: Sequence[Generator] = (),
        start: int | None = None,
        change: Change | None = None,
    ) -> Iterator[DenoisingStep]:
        """See ``Pipeline.chain``."""
        states: Sequence[Tensor] | Callable[[int], Sequence[Tensor]]
        if callable(conditions):
            at_step = conditions

            def states(number: int) -> list[Tensor]:
                return [condition.states for condition in at_step(number)]

        else:
            states = [condition.states for condition in conditions]
        return denoise(
            self.unet,
            self.scheduler,
            states,
            noise,
            num_inference_steps,
            guidance_scale,
            stop,
            generators,
            start,
            change,
        )

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents)

    def save(self, folder: str | Path) -> None:
        """See ``Pipeline.save``."""
        self.to_diffusers().save_pretrained(folder)

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


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration of diffusers without its metadata, such as the version."""
    return {name: str(value) for name, value in config.items() if name == "_class_name" or not name.startswith("_")}


__all__ = ["StableDiffusion"]
