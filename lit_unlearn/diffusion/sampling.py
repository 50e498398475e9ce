"""From ``encoder_hidden_states`` to latents to pictures; each picture has its own seed, on any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lit_unlearn.core.seeds import seeded as seeded
from lit_unlearn.diffusion.compiled import compiled_forward
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.offload import bring
from lit_unlearn.diffusion.parameters import sides
from lit_unlearn.diffusion.samplers import scaled_input, set_steps, start_scale, step_options

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel


def start_chains(shape: tuple[int, int, int], seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Initial noise of chains, each from its own seed, as ``StableDiffusionPipeline`` draws it from such generators.

    Args:
        shape: Channels, height and width of the latents.
        seeds: One for each picture.

    Returns:
        Standard normal noise (B, C, H, W), float32 on the CPU; and the generator of each picture, which has drawn this
        noise and is then used for the noise of the sampler's steps.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Lightning changes the default type in some of its precisions.
    noise = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    return torch.stack(noise), generators


def initial_noise(unet: UNet2DConditionModel, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (B, C, H, W), float32 on the CPU, drawn per picture from its own seed."""
    return start_chains((unet.config.in_channels, *sides(unet.config)), seeds)[0]


def noise_levels(scheduler: SchedulerMixin, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the picture and the noise in x_t at ``timesteps``, each (B, 1, 1, 1), in the dtype of ``latents``."""
    alphas_cumprod = scheduler.alphas_cumprod.to(latents)[timesteps.to(latents.device)].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t (B, C, H, W) of the forward process from ``latents`` and ``noise`` (B, C, H, W) at ``timesteps`` (B,)."""
    alpha, sigma = noise_levels(scheduler, latents, timesteps)
    return alpha * latents + sigma * noise


def training_target(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The UNet's training target (B, C, H, W): the noise, or the velocity if the model predicts velocity."""
    if scheduler.config.prediction_type != "v_prediction":
        return noise
    alpha, sigma = noise_levels(scheduler, latents, timesteps)
    return alpha * noise - sigma * latents


def predicted_noise(scheduler: SchedulerMixin, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The noise (B, C, H, W) that follows from the UNet's ``output`` at ``noisy``, for noise or velocity."""
    if scheduler.config.prediction_type != "v_prediction":
        return output
    alpha, sigma = noise_levels(scheduler, noisy, timesteps)
    return alpha * output + sigma * noisy


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, shift: float | None = None) -> Tensor:
    """Latents (B, C, H, W) of ``pictures`` (B, 3, 8H, 8W), float in [0, 1]: the mean of their distribution.

    Args:
        vae: The autoencoder.
        pictures: The pictures.
        shift: Mean of the autoencoder's latents, which is subtracted, in families that have one.
    """
    bring(vae)
    encoded = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
    return (encoded if shift is None else encoded - shift) * vae.config.scaling_factor


class DenoisingStep(NamedTuple):
    """One step of a sampler.

    Attributes:
        model_input: x_t as the input of the UNet, scaled by the scheduler, (B, C, H, W).
        timestep: t, ().
        noise_preds: The UNet's output for each of the given states, (B, C, H, W) each; empty if the chain is stopped.
        latents: Latents after the step, (B, C, H, W); if the chain is stopped, latents before the step.
    """

    model_input: Tensor
    timestep: Tensor
    noise_preds: tuple[Tensor, ...]
    latents: Tensor


@torch.no_grad()
def take_steps(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    sampler: SchedulerMixin,
    conditions: Sequence[Condition] | Callable[[int], Sequence[Condition]],
    latents: Tensor,
    guidance_scale: float,
    stop: int | None = None,
    generators: Sequence[torch.Generator] = (),
    start: int | None = None,
    change: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[DenoisingStep]:
    """Denoise with classifier-free guidance (Ho and Salimans, 2022), one step at a time; see ``Pipeline.chain``.

    Args:
        predict: The denoiser's output (B, C, H, W) for latents (B, C, H, W), a timestep () and a condition of B
            prompts.
        sampler: A fresh scheduler, ready for the first step; it is used up.
        conditions: As for ``Pipeline.chain``.
        latents: Start of the chains in the denoiser's type and on its device, (B, C, H, W): standard normal; with
            ``start``, latents of that step.
        guidance_scale: Strength of the guidance.
        stop: Stop at the step with this number, counted from 0, before the denoiser is called.
        generators: One per picture, for the noise that some samplers draw in their steps; see ``start_chains``.
        start: Begin with the step of this number, counted from 0, from latents that ``latents_at_step`` makes.
        change: Called with the number of a step and the latents after it; returns the latents to continue with.

    Yields:
        Every step; some schedulers take more steps than they are asked for.

    Raises:
        ValueError: The sampler draws noise, and there are no generators.
    """
    options = step_options(sampler, generators)
    if start is None:
        latents = latents * start_scale(sampler)
    elif hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(start)
    given = () if callable(conditions) else conditions
    together = Condition.cat(list(given)) if given else None
    for number, timestep in enumerate(sampler.timesteps[start or 0 :], start or 0):
        if number == stop:
            yield DenoisingStep(scaled_input(sampler, latents, timestep), timestep, (), latents)
            return
        if callable(conditions):
            given = conditions(number)
            together = Condition.cat(list(given))
        assert together is not None
        model_input = scaled_input(sampler, torch.cat([latents] * len(given)), timestep)
        noise_preds = predict(model_input, timestep, together).chunk(len(given))
        noise_pred = noise_preds[0]
        if len(given) > 1:
            noise_pred = noise_preds[0] + guidance_scale * (noise_preds[1] - noise_preds[0])
        latents = sampler.step(noise_pred, timestep, latents, **options).prev_sample
        if change is not None:
            latents = change(number, latents)
        yield DenoisingStep(model_input[: len(latents)], timestep, noise_preds, latents)


def latents_at_step(
    scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, num_inference_steps: int, step: int
) -> Tensor:
    """Latents (B, C, H, W) that a chain to ``latents`` has before a step, in the scale of the sampler.

    Args:
        scheduler: Its configuration is used, its state is not.
        latents: Latents of pictures, (B, C, H, W).
        noise: Standard normal, (B, C, H, W).
        num_inference_steps: Steps of the sampler.
        step: Number of the step, counted from 0; after the last step there is no noise.
    """
    scheduler = set_steps(scheduler, num_inference_steps, latents.device)
    if step >= len(scheduler.timesteps):
        return latents
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step)  # a timestep may occur twice, at other levels of noise
    noised: Tensor = scheduler.add_noise(latents, noise.to(latents), scheduler.timesteps[step : step + 1])
    return noised


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, shift: float | None = None) -> Tensor:
    """Pictures (B, 3, 8H, 8W), float32 in [0, 1] on the CPU, of ``latents`` (B, C, H, W); see ``encode_pictures``."""
    bring(vae)
    unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    with compiled_forward(vae.decoder):
        pictures = vae.decode(unscaled if shift is None else unscaled + shift).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1).cpu()


class ForwardCount:
    """Counts the pictures that pass through a UNet: ``count`` is the number of forward passes with a batch of one.

    ``backward`` is how many of these also have a backward pass, which costs about two forward passes.
    """

    def __init__(self) -> None:
        self.count = self.backward = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the batch size of ``args``; called by the module as a forward pre-hook."""
        self.count += len(args[0])
        self.backward += len(args[0]) if torch.is_grad_enabled() else 0


@contextmanager
def count_forwards(unet: nn.Module, counter: ForwardCount | None = None) -> Iterator[ForwardCount]:
    """Count the forward passes of ``unet`` inside a ``with`` block; the result is ``count`` of the yielded object."""
    counter = counter or ForwardCount()
    handle = unet.register_forward_pre_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()
