"""The interface of a model, the same for all families: methods and attacks use a model only through it.

    condition = pipeline.encode(prompts)            # the denoiser's input: hidden states, pooled vectors
    pipeline.predict(x_t, t, condition)             # the denoiser's output, e.g. noise or velocity
    pipeline.noise                                  # its noise process: add, target, timesteps, samplers
    pipeline.draw(prompts, seeds, steps, guidance)  # pictures; .sample for latents, .chain for every step of them
    pipeline.texts                                  # its text encoders, each with its tokenizer
    pipeline.sites(names)                           # linear maps by the names of their weights
    pipeline.parts                                  # the modules that hold weights, by name

No code outside this folder calls a denoiser, a text encoder or a sampler itself. A family is a subclass that defines
its parts, how prompts become a condition and how the denoiser is called (``families/``).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.noise import NoiseProcess, Sampler
from lit_unlearn.diffusion.offload import computing_device
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.quick import fixed_texts
from lit_unlearn.diffusion.quiet import quiet_libraries
from lit_unlearn.diffusion.reads_text import ReadsText
from lit_unlearn.diffusion.samplers import check_steps
from lit_unlearn.diffusion.sampling import DenoisingStep, start_chains, take_steps
from lit_unlearn.diffusion.source import EMBEDDED
from lit_unlearn.diffusion.text import plain_settings, text_settings
from lit_unlearn.system.devices import find_device
from lit_unlearn.system.errors import user_errors

Conditions = Sequence[Condition] | Callable[[int], Sequence[Condition]]
"""Conditions of a chain, the same for all its steps or by the number of a step."""
Change = Callable[[int, Tensor], Tensor]
"""From the number of a step and the latents after it to the latents that the chain continues with."""


class Pipeline(ReadsText):
    """Base class of the families; all parameters are frozen when loaded."""

    index_class: ClassVar[str]
    """The pipeline's class in diffusers, as ``_class_name`` in ``model_index.json``."""
    title: ClassVar[str]
    """The models of the family, for messages."""
    form: ClassVar[str]
    """The models that a pipeline of the family is made of, for messages."""
    declared: ClassVar[Mapping[str, Part]]
    """Its parts by name, in the order of ``parts``; each is an attribute."""
    denoiser_part: ClassVar[str]
    """Name of the denoiser among ``parts``."""
    cross_attention: ClassVar[bool] = True
    """Whether the picture attends to the text alone in layers of their own, ``attn2``, as in a UNet."""
    begins: ClassVar[bool] = True
    """Whether the picture attends to a token that begins every prompt, as CLIP's do and T5's do not."""
    flow: ClassVar[bool] = False
    """Whether the denoiser is trained with flow matching, see ``Flow``."""
    takes_guidance: ClassVar[bool] = False
    """Whether the strength of guidance is an input of the denoiser, so that guidance needs no second prediction."""
    read_after: ClassVar[Mapping[str, Mapping[str, int]]]
    """For each text encoder, the layer after which each way of the text reads it (``text_ways``), counted from the last
    (-1), without clip skip (``clip_skip.places_of``); layers behind all of them act on nothing."""
    ways: ClassVar[tuple[str, ...]] = ("tokens", "pooled")
    """The ways (``text_ways``) on which text may enter the denoiser."""
    loads_lora: ClassVar[bool] = True
    """Whether diffusers' pipeline loads LoRA weights."""
    mended: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Fields that diffusers' pipeline changes in configurations of 2022 when it loads them, by part."""

    vae: Any
    """Latents (B, C, h, w) to pictures (B, 3, H, W) and back."""
    scheduler: Any
    """The sampler's configuration; every sampling takes a fresh copy."""

    @staticmethod
    def load(
        model: str | os.PathLike[str] = EMBEDDED,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        config_folder: str | None = None,
        device: str | None = None,
        clip_skip: int | None = None,
    ) -> Pipeline:
        """Load a model, frozen and in evaluation mode.

        Args:
            model: A folder in the diffusers layout, a single file of safetensors, ``emoji-sd`` or ``emoji-dit``, which
                are embedded, or a hub id.
            dtype: Type of the weights.
            revision: Branch, tag or commit of a hub id.
            config_folder: Folder with the tokenizers of a single file, and with the parts that it does not hold.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.
            clip_skip: Layers that prompts are read earlier, as in diffusers; None for none.

        Raises:
            UserError: There is no such model or device, its files are not valid, or it has no such clip skip.
        """
        from lit_unlearn.diffusion.base_model import BaseModel  # which knows pipelines

        with user_errors():
            place = find_device(device)
            return BaseModel.find(os.fspath(model), revision, config_folder, clip_skip).load(dtype, place)

    # --- defined by each family

    @classmethod
    @abstractmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """Check that the pipeline can use its parts' configurations, and that these fit together.

        Args:
            configs: Configuration of each part that has weights, by name; absent parts are left out.
            model: The model's name, which begins the messages.

        Raises:
            ValueError: They do not; the message names the field.
        """

    @classmethod
    def options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the family besides its parts, from ``model_index.json``."""
        return {}

    @classmethod
    @abstractmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> NoiseProcess:
        """The noise process of a pipeline, from its scheduler and the denoiser's configuration."""

    @classmethod
    def unread(cls, names: Sequence[str]) -> list[str]:
        """Full names of weights among ``names`` that nothing depends on: they are not read, or only by others such."""
        return []

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""

    @abstractmethod
    def num_places(self, name: str) -> int:
        """Positions (height times width) that the block of the denoiser's weight ``name`` works on."""

    @abstractmethod
    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The denoiser's output (B, C, H, W).

        Args:
            x_t: Noised latents, (B, C, H, W).
            timesteps: (B,), or () for one timestep for all.
            condition: Condition of B prompts.
            values: Weights that replace the denoiser's own in this call, by their names within it.
        """

    @abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents (B, C, h, w) of ``pictures`` (B, 3, H, W), float in [0, 1]: the mean of their distribution."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1] on the CPU, of ``latents`` (B, C, h, w)."""

    def save(self, folder: Any) -> None:
        """Write the pipeline as a diffusers folder that ``DiffusionPipeline.from_pretrained`` loads."""
        with quiet_libraries():
            self.to_diffusers().save_pretrained(folder)

    @abstractmethod
    def to_diffusers(self) -> Any:
        """The same parts as a pipeline of diffusers."""

    # --- the same for all families

    def settings(self) -> dict[str, Any]:
        """Everything besides the weights that changes pictures, as values of JSON, for the keys of caches."""
        configs: dict[str, Any] = {name: part.config for name, part in self.parts.items()}
        texts = {text.part for text in self.texts}
        return {
            **{name: (text_settings if name in texts else plain_settings)(config) for name, config in configs.items()},
            "scheduler": plain_settings(self.scheduler.config),
            "latents": list(self.latent_shape),
            **({} if self.clip_skip is None else {"clip_skip": self.clip_skip}),
        }

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that hold weights, by name; full names of weights begin with it."""
        found = {name: getattr(self, name) for name, part in self.declared.items() if part.has_weights}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def noise(self) -> NoiseProcess:
        """The noise process that the model was trained with."""
        return self.process(self.scheduler, self.denoiser.config)  # type: ignore[attr-defined, arg-type]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the model's pictures, in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.latent_shape
        return height * factor, width * factor

    def check_steps(self, num_inference_steps: int, field: str) -> None:
        """As ``BaseModel.check_steps``, for the loaded sampler."""
        arguments = self.noise.step_arguments(num_inference_steps)
        check_steps(self.scheduler, num_inference_steps, field, **arguments)

    def with_sampler(self, kind: Sampler) -> Pipeline:
        """The same parts with another sampler; see ``DDPM.with_sampler`` and ``Flow.with_sampler``."""
        return replace(self, scheduler=self.noise.with_sampler(kind).scheduler)  # type: ignore[type-var]

    @property
    def leads_from_empty(self) -> bool:
        """Whether guidance leads away from the empty prompt, as the text encoders read it."""
        return not self.takes_guidance

    def told(self, guidance_scale: float) -> Pipeline:
        """The pipeline whose predictions for one condition alone are guided, if its denoiser takes the strength."""
        return self

    def chain(
        self,
        conditions: Conditions,
        noise: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        stop: int | None = None,
        generators: Sequence[torch.Generator] = (),
        start: int | None = None,
        change: Change | None = None,
    ) -> Iterator[DenoisingStep]:
        """Denoise with classifier-free guidance (Ho and Salimans, 2022), one step at a time.

        Args:
            conditions: Only the prompts' condition, which means no guidance; or the conditions of the empty prompt, of
                the prompts, and of any other prompts for which predictions are needed. Or a function that returns them
                for the number of a step.
            noise: Start of the chains, standard normal, (B, C, H, W); with ``start``, latents from ``noise.at_step``.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Strength of the guidance.
            stop: Stop at the step with this number, counted from 0, before the denoiser is called.
            generators: One per picture, for samplers that draw noise in their steps; from ``start_chains``.
            start: Begin with the step of this number, counted from 0; None for the first step, from noise.
            change: Called after each step; it may replace the latents.

        Raises:
            ValueError: The sampler draws noise, and there are no generators.
        """
        return take_steps(
            self.predict,
            self.noise.sampler(num_inference_steps, self.device),
            conditions,
            noise.to(self.device, self.dtype),
            guidance_scale,
            stop,
            generators,
            start,
            change,
        )

    def start_chains(self, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
        """Initial noise (B, C, H, W), float32 on the CPU, and generators of pictures; see ``sampling.start_chains``."""
        return start_chains(self.latent_shape, seeds)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal noise (B, C, H, W), float32 on the CPU, drawn per picture from its own seed."""
        return self.start_chains(seeds)[0]

    @property
    def denoiser(self) -> nn.Module:
        """The part that denoises."""
        return self.parts[self.denoiser_part]

    @property
    def device(self) -> torch.device:
        """Device that the denoiser computes on."""
        return computing_device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight by its full name, such as ``unet.mid_block.attentions.0...attn2.to_k.weight``."""
        return {f"{part}.{name}": p for part, module in self.parts.items() for name, p in module.named_parameters()}

    def sites(self, names: Sequence[str]) -> dict[str, nn.Linear]:
        """The linear maps whose weights have the full names ``names``.

        Raises:
            ValueError: One of them is not the weight of a linear layer.
        """
        return {name: self.linear(name) for name in names}

    def linear(self, name: str) -> nn.Linear:
        """The linear layer whose weight has the full name ``name``.

        Raises:
            ValueError: The parameter is not the weight of a linear layer.
        """
        part, _, path = name.partition(".")
        layer = self.parts[part].get_submodule(path.rsplit(".", 1)[0])
        if not isinstance(layer, nn.Linear) or not name.endswith(".weight"):
            raise ValueError(f"edited_parameters selects {name}, which is not the weight of a linear layer.")
        return layer

    @property
    def token_order(self) -> tuple[int, ...]:
        """Numbers of the text encoders whose positions follow one another in ``Condition.states``.

        Encoders whose states lie beside each other at the same positions count as the first of them.
        """
        return (0,)

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """What the first linear maps on text read of ``condition``, (B, L, d_in) for each way; see ``text_ways``."""
        return {"tokens": condition.states}

    def sample(
        self,
        condition: Condition,
        noise: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        unconditional: Condition | None = None,
        generators: Sequence[torch.Generator] = (),
        start: int | None = None,
        change: Change | None = None,
    ) -> Tensor:
        """Latents (B, C, H, W) of prompts: the end of ``chain``.

        Args:
            condition: Condition of B prompts.
            noise: Start of the chains, (B, C, H, W).
            num_inference_steps: Steps of the sampler.
            guidance_scale: Strength of the guidance; 1 means no guidance and half as many forward passes.
            unconditional: Condition that the guidance leads away from, (1 or B prompts); None for the model's own.
            generators: As for ``chain``.
            start: As for ``chain``.
            change: As for ``chain``.
        """
        conditions = self.guided(condition, guidance_scale, unconditional)
        latents = noise
        settings = num_inference_steps, guidance_scale
        with fixed_texts(self.denoiser):
            for step in self.chain(conditions, noise, *settings, None, generators, start, change):
                latents = step.latents
        return latents

    def guided(
        self, condition: Condition, guidance_scale: float, unconditional: Condition | None = None
    ) -> list[Condition]:
        """The conditions that ``chain`` needs for ``condition``; arguments as for ``sample``."""
        if guidance_scale == 1:
            return [condition]
        empty = self.unconditional() if unconditional is None else unconditional
        return [empty.expand(len(condition)), condition]

    @torch.no_grad()
    def draw_latents(
        self,
        condition: Condition,
        seeds: Sequence[int],
        num_inference_steps: int,
        guidance_scale: float,
        unconditional: Condition | None = None,
    ) -> Tensor:
        """Latents (B, C, H, W) of the prompts of ``condition``, each from its own seed; see ``sample``."""
        noise, generators = self.start_chains(seeds)
        return self.sample(condition, noise, num_inference_steps, guidance_scale, unconditional, generators)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        guidance_scale: float,
        batch_size: int | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1] on the CPU, each from its own seed; ``batch_size`` at once."""
        pictures, size = [], batch_size or max(1, len(prompts))
        empty = None if guidance_scale == 1 or self.takes_guidance else self.unconditional()
        for part in (slice(start, start + size) for start in range(0, max(1, len(prompts)), size)):
            given = self.encode(prompts[part]), seeds[part], num_inference_steps, guidance_scale, empty
            pictures.append(self.decode(self.draw_latents(*given)))
        return torch.cat(pictures)
