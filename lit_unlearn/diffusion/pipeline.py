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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.discrete_prompts import shared_words, words_of
from lit_unlearn.diffusion.noise import NoiseProcess, Sampler
from lit_unlearn.diffusion.offload import computing_device
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.prompts import ENCODE_BATCH, PromptReader
from lit_unlearn.diffusion.quiet import quiet_libraries
from lit_unlearn.diffusion.samplers import check_steps
from lit_unlearn.diffusion.sampling import DenoisingStep, start_chains, take_steps
from lit_unlearn.diffusion.source import EMBEDDED
from lit_unlearn.diffusion.text import TextEncoder, Tokens, text_settings
from lit_unlearn.system.devices import find_device
from lit_unlearn.system.errors import user_errors

Conditions = Sequence[Condition] | Callable[[int], Sequence[Condition]]
"""Conditions of a chain, the same for all its steps or by the number of a step."""
Change = Callable[[int, Tensor], Tensor]
"""From the number of a step and the latents after it to the latents that the chain continues with."""


class Pipeline(ABC):
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
    flow: ClassVar[bool] = False
    """Whether the denoiser is trained with flow matching, see ``Flow``."""
    takes_guidance: ClassVar[bool] = False
    """Whether the strength of guidance is an input of the denoiser, so that guidance needs no second prediction."""
    read_after: ClassVar[Mapping[str, Mapping[str, int]]]
    """For each text encoder, the layer after which each way of the text reads it (``text_ways``), counted from the last
    (-1); layers behind all of them act on nothing."""
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
    ) -> Pipeline:
        """Load a model, frozen and in evaluation mode.

        Args:
            model: A folder in the diffusers layout, a single file of safetensors, ``emoji-sd`` or ``emoji-dit``, which
                are embedded, or a hub id.
            dtype: Type of the weights.
            revision: Branch, tag or commit of a hub id.
            config_folder: Folder with the tokenizers of a single file, and with the parts that it does not hold.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.

        Raises:
            UserError: There is no such model or device, or its files are not complete or not valid.
        """
        from lit_unlearn.diffusion.base_model import BaseModel  # which knows pipelines

        with user_errors():
            place = find_device(device)
            return BaseModel.find(os.fspath(model), revision, config_folder).load(dtype, place)

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
    def texts(self) -> tuple[TextEncoder, ...]:
        """The text encoders, each with its tokenizer."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""

    @abstractmethod
    def num_places(self, name: str) -> int:
        """Positions (height times width) that the block of the denoiser's weight ``name`` works on."""

    @abstractmethod
    def condition(self, tokens: Tokens) -> Condition:
        """The condition for prompts, with one forward pass of each text encoder."""

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
            **{name: (text_settings if name in texts else _plain)(config) for name, config in configs.items()},
            "scheduler": _plain(self.scheduler.config),
            "latents": list(self.latent_shape),
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

    def unconditional(self) -> Condition:
        """The condition, of one row, that guidance leads away from: that of the empty prompt."""
        return self.encode([""])

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

    @property
    def reader(self) -> PromptReader:
        """Reads prompts as the text encoders do."""
        return PromptReader(*zip(*((text.tokenizer, text.length, text.part) for text in self.texts), strict=True))

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """``prompts`` as each text encoder reads them; warns of prompts that are cut off."""
        return Tokens(tuple(text.tokenize(prompts) for text in self.texts))

    def tokenize_templates(self, templates: Sequence[str], count: int) -> Tokens:
        """As ``tokenize``, for templates in which every ``{}`` stands for ``count`` learned tokens."""
        ids, slots = zip(*(text.tokenize_templates(templates, count) for text in self.texts), strict=True)
        return Tokens(ids, slots)

    # A learned token is new in every text encoder. Its embeddings in them lie side by side, each divided by the size of
    # its encoder's vocabulary relative to that of the first, so that one learning rate suits all: those of a T5 are
    # much larger than those of a CLIP.

    @property
    def token_widths(self) -> list[int]:
        """Widths of the text encoders' embeddings, whose sum D is that of a learned token."""
        return [text.table.shape[1] for text in self.texts]

    @cached_property
    def token_scales(self) -> list[float]:
        """Size (root mean square) of each text encoder's embeddings, relative to that of the first one's."""
        if len(self.texts) == 1:
            return [1.0]
        sizes = [text.vocabulary_norm / text.table.shape[1] ** 0.5 for text in self.texts]
        return [size / sizes[0] for size in sizes]

    @property
    def vocabulary_norms(self) -> list[float]:
        """Mean norm of each text encoder's embeddings, in the units of learned tokens."""
        return [text.vocabulary_norm / scale for text, scale in zip(self.texts, self.token_scales, strict=True)]

    def initial_embeddings(self, count: int, words: str | None, generator: torch.Generator) -> Tensor:
        """Initial embeddings (count, D), float32, of learned tokens; see ``TextEncoder.initial_embeddings``."""
        found = [text.initial_embeddings(count, words, generator) for text in self.texts]
        return torch.cat([own / scale for own, scale in zip(found, self.token_scales, strict=True)], dim=1)

    def encode(self, prompts: Sequence[str] | Tokens, embeddings: Tensor | None = None) -> Condition:
        """The condition for ``prompts``, in one forward pass.

        Args:
            prompts: Texts, or tokens from ``tokenize``.
            embeddings: Embeddings of the learned tokens in them, (n, D); gradients flow into them.
        """
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenize(prompts)
        if embeddings is None:
            return self.condition(tokens)
        parts = embeddings.split(self.token_widths, dim=1)
        with ExitStack() as stack:
            for text, own, scale, slots in zip(self.texts, parts, self.token_scales, tokens.slots, strict=True):
                stack.enter_context(text.learned(own * scale, slots))
            return self.condition(tokens)

    def whole_words(self, forbidden: Callable[[str], object] | None = None, phrases: Sequence[str] = ()) -> Tensor:
        """Words that are one token for every text encoder, as their ids (A, E) in each; see ``shared_words``."""
        return shared_words([text.tokenizer for text in self.texts], forbidden, phrases)

    def words_of(self, words: Tensor) -> str:
        """The text of words (k, E) from ``whole_words``."""
        return words_of(self.texts[0].tokenizer, words[:, 0].tolist())

    def encode_mixtures(self, weights: Tensor, allowed: Tensor, tokens: Tokens) -> Condition:
        """As ``encode``, with learned tokens that are mixtures of vocabulary tokens; gradients flow into ``weights``.

        Args:
            weights: Weight of each allowed token in each learned token, (k, A).
            allowed: Ids of the allowed tokens in each of E text encoders, (A, E).
            tokens: Tokens from ``tokenize_templates``.
        """
        found = []
        for text, ids, scale in zip(self.texts, allowed.unbind(1), self.token_scales, strict=True):
            rows = text.table.detach()[ids.to(text.table.device)].to(weights)
            found.append(weights @ rows / scale)
        return self.encode(tokens, torch.cat(found, dim=1))

    def encode_many(self, prompts: Sequence[str] | Tokens) -> Condition:
        """As ``encode``, in batches if there are many prompts."""
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenize(prompts)
        return Condition.cat([self.condition(part) for part in tokens.split(ENCODE_BATCH)])

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
        for step in self.chain(
            conditions, noise, num_inference_steps, guidance_scale, generators=generators, start=start, change=change
        ):
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
    def image_to_image(
        self,
        condition: Condition,
        latents: Tensor,
        seeds: Sequence[int],
        num_inference_steps: int,
        guidance_scale: float,
        strength: float,
        unconditional: Condition | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, H, W) of pictures that are noised and denoised again (SDEdit, Meng et al., 2022).

        They equal those of ``StableDiffusionImg2ImgPipeline``; with ``mask``, those of
        ``StableDiffusionInpaintPipeline`` with a model without further channels.

        Args:
            condition: Condition of B prompts.
            latents: Latents of the pictures, (B, C, H, W).
            seeds: Seed of each picture.
            num_inference_steps: Steps of the sampler from noise.
            guidance_scale: Strength of the guidance; 1 means no guidance.
            strength: Share of the steps that are taken, in (0, 1].
            unconditional: As for ``sample``.
            mask: 1 where the picture is drawn anew and 0 where it stays, broadcast to (B, C, H, W); None for all of it.
                What stays is put back after each step, with the noise of the next (blending, as in RePaint, Lugmayr et
                al., 2022). With the whole ``strength`` the chain then begins at noise alone.

        Raises:
            ValueError: ``strength`` is less than one step.
        """
        noise, generators = self.start_chains(seeds)
        latents, noise = latents.to(self.device, self.dtype), noise.to(self.device, self.dtype)
        start: int | None = self.noise.start_step(num_inference_steps, strength)
        if start == self.noise.start_step(num_inference_steps, 0):
            raise ValueError(f"strength={strength} is less than one of {num_inference_steps} steps: give more of one.")
        change = None
        if mask is not None:
            kept = mask.to(latents)

            def change(number: int, drawn: Tensor) -> Tensor:
                original = self.noise.at_step(latents, noise, num_inference_steps, number + 1)
                return (1 - kept) * original + kept * drawn

        if mask is not None and strength == 1:
            start, begin = None, noise
        else:
            assert start is not None
            begin = self.noise.at_step(latents, noise, num_inference_steps, start)
        options = {"generators": generators, "start": start, "change": change}
        return self.sample(condition, begin, num_inference_steps, guidance_scale, unconditional, **options)  # type: ignore[arg-type]

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
        self, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, guidance_scale: float
    ) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1] on the CPU, of ``prompts``, each from its own seed."""
        return self.decode(self.draw_latents(self.encode(prompts), seeds, num_inference_steps, guidance_scale))


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration of diffusers without its metadata, such as the version."""
    return {name: str(value) for name, value in config.items() if name == "_class_name" or not name.startswith("_")}
