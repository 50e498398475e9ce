"""Noise processes: how a picture becomes noise, what a denoiser is trained to say of it, and the sampler back.

``DDPM`` is that of Stable Diffusion 1 and 2, with its two ways to say it, noise and velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_unlearn.diffusion.samplers import set_steps
from lit_unlearn.diffusion.sampling import add_noise, noise_levels, predicted_noise, training_target

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


Sampler = Literal["model", "ddim"]
"""Whose sampler: the model's own, or DDIM."""


@dataclass(frozen=True)
class DDPM:
    """The forward process ``x_t = a_t x + s_t noise`` of a diffusers scheduler, and fresh copies of its sampler.

    Attributes:
        scheduler: Its configuration is used, its state is not.
    """

    scheduler: SchedulerMixin

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the model was trained with."""
        return len(self.scheduler.alphas_cumprod)

    def levels(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the picture and of the noise in x_t, (B, 1, 1, 1) each, of the type of ``latents``."""
        return noise_levels(self.scheduler, latents, timesteps)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, H, W) of ``latents`` and ``noise`` (B, C, H, W) at ``timesteps`` (B,)."""
        return add_noise(self.scheduler, latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to say (B, C, H, W): the noise, or the velocity if the model predicts that."""
        return training_target(self.scheduler, latents, noise, timesteps)

    def noise_of(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise (B, C, H, W) that the denoiser's ``output`` at ``noisy`` stands for, whatever it predicts."""
        return predicted_noise(self.scheduler, output, noisy, timesteps)

    def draw_timestep(self, generator: torch.Generator, low: int = 0, high: int | None = None) -> Tensor:
        """A timestep, (), uniform from ``low`` to below ``high`` (default: all), on the processor."""
        return torch.randint(low, self.num_timesteps if high is None else high, (), generator=generator)

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """Timesteps (S,) of a chain; some samplers take more than ``num_inference_steps``."""
        return set_steps(self.scheduler, num_inference_steps).timesteps

    def with_sampler(self, kind: Sampler) -> DDPM:
        """The same process with the ``model``'s own sampler, or with DDIM as Stable Diffusion's first code has it."""
        if kind == "model":
            return self
        from diffusers import DDIMScheduler

        changes = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        return DDPM(DDIMScheduler.from_config(self.scheduler.config, **changes))
