"""Noise processes: how a picture becomes noise, what a denoiser learns to predict, and the sampler that removes noise.

``DDPM`` is the process of Stable Diffusion 1, 2 and XL and of PixArt; its denoiser predicts noise or velocity. ``Flow``
is that of Stable Diffusion 3 and FLUX. Both have the same interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_unlearn.diffusion.samplers import set_steps
from lit_unlearn.diffusion.sampling import (
    add_noise,
    latents_at_step,
    noise_levels,
    predicted_noise,
    training_target,
)

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


Sampler = Literal["model", "ddim"]
"""The sampler: the model's own, or DDIM."""


@dataclass(frozen=True)
class DDPM:
    """The forward process ``x_t = a_t x + s_t noise`` of a diffusers scheduler, and fresh copies of its sampler.

    Attributes:
        scheduler: Its configuration is used, its state is not.
    """

    scheduler: SchedulerMixin

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps that the model was trained with."""
        return len(self.scheduler.alphas_cumprod)

    def levels(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the picture and of the noise in x_t, (B, 1, 1, 1) each, in the dtype of ``latents``."""
        return noise_levels(self.scheduler, latents, timesteps)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, H, W) of ``latents`` and ``noise`` (B, C, H, W) at ``timesteps`` (B,)."""
        return add_noise(self.scheduler, latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's training target (B, C, H, W): the noise, or the velocity if the model predicts velocity."""
        return training_target(self.scheduler, latents, noise, timesteps)

    def noise_of(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise (B, C, H, W) that follows from the denoiser's ``output`` at ``noisy``, for noise or velocity."""
        return predicted_noise(self.scheduler, output, noisy, timesteps)

    def draw_timestep(self, generator: torch.Generator, low: int = 0, high: int | None = None) -> Tensor:
        """A random timestep, (), uniform in [``low``, ``high``) (default: all timesteps), on the CPU."""
        return torch.randint(low, self.num_timesteps if high is None else high, (), generator=generator)

    def step_arguments(self, num_inference_steps: int) -> dict[str, Any]:
        """Further arguments with which the sampler's steps are set; none here."""
        return {}

    def sampler(self, num_inference_steps: int, device: torch.device | str | None = None) -> SchedulerMixin:
        """A fresh sampler, ready for the first step, with its timesteps on ``device``."""
        return set_steps(self.scheduler, num_inference_steps, device, **self.step_arguments(num_inference_steps))

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """Timesteps (S,) of a chain; some samplers take more than ``num_inference_steps``."""
        return self.sampler(num_inference_steps).timesteps

    def at_step(self, latents: Tensor, noise: Tensor, num_inference_steps: int, step: int) -> Tensor:
        """Latents before step number ``step`` of a chain to ``latents``; see ``sampling.latents_at_step``."""
        return latents_at_step(self.scheduler, latents, noise, num_inference_steps, step)

    def start_step(self, num_inference_steps: int, strength: float) -> int:
        """Number of the first step of a chain that begins at a picture, as in the pipelines of diffusers.

        Args:
            num_inference_steps: Steps of the sampler from noise.
            strength: Share of these steps that are taken, rounded down, in (0, 1].
        """
        skipped = num_inference_steps - int(num_inference_steps * strength)
        return skipped * int(getattr(self.scheduler, "order", 1))

    def steps_taken(self, num_inference_steps: int, strength: float) -> int:
        """Steps of a chain that begins at ``start_step``; a step of some samplers has two evaluations."""
        order = int(getattr(self.scheduler, "order", 1))
        return num_inference_steps - self.start_step(num_inference_steps, strength) // order

    def with_sampler(self, kind: Sampler) -> DDPM:
        """The same process with the ``model``'s own sampler, or with DDIM as in Stable Diffusion's original code."""
        if kind == "model":
            return self
        from diffusers import DDIMScheduler

        changes = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        return DDPM(DDIMScheduler.from_config(self.scheduler.config, **changes))


@dataclass(frozen=True)
class Flow:
    """The straight path ``x_t = (1 - s) x + s noise``, ``s = t / 1000`` (rectified flow, Liu et al., 2023).

    The denoiser predicts the velocity ``noise - x`` along the path, which is the same at all timesteps (flow matching,
    Lipman et al., 2023). Timesteps are in (0, 1000] and need not be whole numbers.

    Attributes:
        scheduler: Its configuration is used, its state is not.
        num_patches: Number of the patches that a picture's latents are cut into; with ``use_dynamic_shifting`` the
            sampler's timesteps depend on it.
        whole_range: Whether a chain of S steps begins its steps at the levels 1, 1 - 1/S, ..., 1/S before they are
            shifted, as in FLUX; else they are set by the scheduler alone.
    """

    scheduler: SchedulerMixin
    num_patches: int
    whole_range: bool = False

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps that the model was trained with."""
        return int(self.scheduler.config.num_train_timesteps)

    def levels(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the picture and of the noise in x_t, (B, 1, 1, 1) each, in the dtype of ``latents``."""
        sigma = (timesteps.to(latents.device).double() / self.num_timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, H, W) of ``latents`` and ``noise`` (B, C, H, W) at ``timesteps`` (B,)."""
        picture, sigma = self.levels(latents, timesteps)
        return picture * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's training target (B, C, H, W): the velocity."""
        return noise - latents

    def noise_of(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise (B, C, H, W) that follows from the denoiser's ``output`` at ``noisy``."""
        picture, _ = self.levels(noisy, timesteps)
        return noisy + picture * output

    def draw_timestep(self, generator: torch.Generator, low: int = 0, high: int | None = None) -> Tensor:
        """A random timestep, (), on the CPU: one more than a whole number that is uniform in [``low``, ``high``).

        So all timesteps, 1 to 1000, are drawn by default, as often as each other: the shift of the sampler's timesteps
        to high levels of noise is not in it.
        """
        return 1 + torch.randint(low, self.num_timesteps if high is None else high, (), generator=generator)

    def step_arguments(self, num_inference_steps: int) -> dict[str, Any]:
        """Further arguments with which the sampler's steps are set, as in the pipelines of diffusers."""
        config, arguments = self.scheduler.config, {}
        if self.whole_range and not config.get("use_flow_sigmas"):
            arguments["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            arguments["mu"] = low + (high - low) / (many - few) * (self.num_patches - few)
        return arguments

    def sampler(self, num_inference_steps: int, device: torch.device | str | None = None) -> SchedulerMixin:
        """See ``DDPM.sampler``."""
        return set_steps(self.scheduler, num_inference_steps, device, **self.step_arguments(num_inference_steps))

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """Timesteps (S,) of a chain."""
        return self.sampler(num_inference_steps).timesteps

    def at_step(self, latents: Tensor, noise: Tensor, num_inference_steps: int, step: int) -> Tensor:
        """Latents before step number ``step`` of a chain to ``latents``; after the last step there is no noise."""
        sigma = self.sampler(num_inference_steps, latents.device).sigmas[step].to(latents.dtype)
        return sigma * noise.to(latents) + (1.0 - sigma) * latents

    def start_step(self, num_inference_steps: int, strength: float) -> int:
        """Number of the first step of a chain that begins at a picture, as in the pipelines of diffusers.

        Args:
            num_inference_steps: Steps of the sampler from noise.
            strength: Share of these steps that are taken, rounded up, in (0, 1].
        """
        return int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))

    def steps_taken(self, num_inference_steps: int, strength: float) -> int:
        """Steps of a chain that begins at ``start_step``."""
        return num_inference_steps - self.start_step(num_inference_steps, strength)

    def with_sampler(self, kind: Sampler) -> Flow:
        """The same process with the ``model``'s own sampler.

        Raises:
            ValueError: Another sampler is asked for; DDIM is for models that predict noise.
        """
        if kind != "model":
            raise ValueError(f"sampler={kind!r} is not for models of flow matching: choose 'model'.")
        return self


NoiseProcess = DDPM | Flow
"""The noise process of a model."""
