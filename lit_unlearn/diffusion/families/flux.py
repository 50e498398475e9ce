"""FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_equal, check_latents
from lit_unlearn.diffusion.noise import Flow
from lit_unlearn.diffusion.offload import call_with
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Change, Conditions, Pipeline
from lit_unlearn.diffusion.sampling import DenoisingStep, decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

T5_LENGTH = 512
"""Tokens that the T5 reads, as by default in diffusers."""
SIDE = 128
"""Side of the latents of pictures, as by default in diffusers: no configuration has it."""


@dataclass(eq=False)
class Flux(Pipeline):
    """FLUX.1 dev and schnell: a transformer that reads a T5's states and picture as one sequence, and a pooled vector.

    The transformer was distilled: without another prompt to lead away from, ``guidance_scale`` is an input of it (dev),
    or acts on nothing (schnell), and no step has a second forward pass. With one, ``guidance_scale`` is that of
    classifier-free guidance, and ``guidance`` is the input.

    Attributes:
        tokenizer: Turns prompts into ``input_ids`` of the CLIP.
        text_encoder: ``input_ids`` (B, L) to the pooled vectors (B, P).
        tokenizer_2: Turns prompts into ``input_ids`` of the T5.
        text_encoder_2: ``input_ids`` (B, 512) to states (B, 512, D).
        transformer: Predicts the velocity from 2 by 2 patches of latents, (B, HW / 4, 4C) both.
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
        guidance: Guidance that the transformer is told of in ``predict``, if it takes any.
        sample_size: Side of the latents of pictures.
    """

    index_class: ClassVar[str] = "FluxPipeline"
    title: ClassVar[str] = "FLUX.1"
    form: ClassVar[str] = "a CLIPTextModel, a T5EncoderModel, a FluxTransformer2DModel and an AutoencoderKL"
    declared: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), encoder="text_encoder"),
        "text_encoder": Part(("CLIPTextModel",)),
        "tokenizer_2": Part(("T5Tokenizer", "T5TokenizerFast"), encoder="text_encoder_2", length=T5_LENGTH),
        "text_encoder_2": Part(("T5EncoderModel",)),
        "transformer": Part(("FluxTransformer2DModel",)),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }
    denoiser_part: ClassVar[str] = "transformer"
    cross_attention: ClassVar[bool] = False
    begins: ClassVar[bool] = False
    read_after: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "text_encoder": {"pooled": -1},
        "text_encoder_2": {"tokens": -1},
    }
    flow: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: T5Tokenizer
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    guidance: float = 3.5
    sample_size: int = SIDE

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        first, second, transformer = configs["text_encoder"], configs["text_encoder_2"], configs["transformer"]
        out = transformer.in_channels if transformer.out_channels is None else transformer.out_channels
        channels = {"a quarter of transformer in_channels": transformer.in_channels / 4}
        check_latents({**channels, "a quarter of transformer out_channels": out / 4}, configs["vae"], model)
        width, pooled = transformer.joint_attention_dim, transformer.pooled_projection_dim
        check_equal({"transformer joint_attention_dim": width, "text_encoder_2 d_model": second.d_model}, model)
        check_equal({"transformer pooled_projection_dim": pooled, "text_encoder hidden_size": first.hidden_size}, model)
        if configs["vae"].shift_factor is None:
            raise ValueError(f"model={model!r}: vae/config.json has no shift_factor: copy the part again.")

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> Flow:
        """See ``Pipeline.process``, for pictures of the usual size."""
        return Flow(scheduler, (SIDE // 2) ** 2, whole_range=True)

    @property
    def noise(self) -> Flow:
        """See ``Pipeline.noise``."""
        return Flow(self.scheduler, (self.sample_size // 2) ** 2, whole_range=True)

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        return (
            TextEncoder("text_encoder", self.text_encoder, self.tokenizer),
            TextEncoder(
                "text_encoder_2",
                self.text_encoder_2,
                self.tokenizer_2,
                positions=min(T5_LENGTH, self.tokenizer_2.model_max_length),
            ),
        )

    @property
    def token_order(self) -> tuple[int, ...]:
        """See ``Pipeline.token_order``: the T5 alone."""
        return (1,)

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """See ``Pipeline.first_inputs``."""
        assert condition.pooled is not None
        return {"tokens": condition.states, "pooled": condition.pooled.unsqueeze(1)}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        return self.transformer.config.in_channels // 4, self.sample_size, self.sample_size

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``; all blocks work on the same patches."""
        return (self.sample_size // 2) ** 2

    def settings(self) -> dict[str, Any]:
        """See ``Pipeline.settings``."""
        return {**super().settings(), "guidance": self.guidance}

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``."""
        first, second = self.texts
        return Condition(second.states(tokens.ids[1]), first.read(tokens.ids[0])[1])

    def guided(
        self, condition: Condition, guidance_scale: float, unconditional: Condition | None = None
    ) -> list[Condition]:
        """See ``Pipeline.guided``; without ``unconditional`` only ``condition``."""
        if unconditional is None:
            return [condition]
        return super().guided(condition, guidance_scale, unconditional)

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
        """See ``Pipeline.chain``; of a single condition, ``guidance_scale`` is the transformer's input."""
        first = conditions(start or 0) if callable(conditions) else conditions
        drawn = self.told(guidance_scale) if len(first) == 1 else self
        options = (num_inference_steps, guidance_scale, stop, generators, start, change)
        return super(Flux, drawn).chain(conditions, noise, *options)

    def told(self, guidance_scale: float) -> Flux:
        """See ``Pipeline.told``."""
        return replace(self, guidance=guidance_scale)

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``."""
        count, channels, height, width = x_t.shape
        patches = x_t.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        states = condition.states
        places = torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2))
        image_ids = torch.nn.functional.pad(places, (1, 0)).to(states)
        text_ids = torch.zeros(states.shape[1], 3).to(states)
        given: tuple[Any, ...] = (
            patches.reshape(count, height * width // 4, 4 * channels),
            states,
            condition.pooled,
            timesteps.to(x_t.device).expand(count).to(x_t.dtype) / 1000,
            image_ids,
            text_ids,
        )
        if self.transformer.config.guidance_embeds:
            given += (torch.full((count,), self.guidance, device=x_t.device, dtype=torch.float32),)
        if values is None:
            output = self.transformer(*given).sample
        else:
            output = call_with(self.transformer, values, given).sample
        output = output.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(count, channels, height, width)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures, self.vae.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents, self.vae.config.shift_factor)

    def to_diffusers(self) -> FluxPipeline:
        """The same parts as a pipeline of diffusers."""
        from diffusers import FluxPipeline

        return FluxPipeline(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )


__all__ = ["Flux"]
