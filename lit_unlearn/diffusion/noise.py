"""Noise processes: how a picture becomes noise, what a denoiser learns to predict, and the sampler that removes noise.

``DDPM`` is the process of Stable Diffusion 1 and 2; its denoiser predicts noise or velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """Timesteps (S,) of a chain; some samplers take more than ``num_inference_steps``."""
        return set_steps(self.scheduler, num_inference_steps).timesteps

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

    def with_sampler(self, kind: Sampler) -> DDPM:
        """The same process with the ``model``'s own sampler, or with DDIM as in Stable Diffusion's original code."""
        if kind == "model":
            return self
        from diffusers import DDIMScheduler

        changes = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        return DDPM(DDIMScheduler.from_config(self.scheduler.config, **changes))
