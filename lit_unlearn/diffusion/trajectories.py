"""Sampling chains of which states are kept to train on, and the order in which a training uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.diffusion.sampling import denoise, seeded

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DConditionModel


def chain_scheduler(scheduler: SchedulerMixin, kind: Literal["model", "ddim"]) -> SchedulerMixin:
    """The sampler of chains: the model's own, or DDIM (Song et al., 2021) as Stable Diffusion's first code has it."""
    if kind == "model":
        return scheduler
    from diffusers import DDIMScheduler

    changes = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def chain_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> Tensor:
    """Timesteps (S,) of the states of a chain; some schedulers take one more than ``num_inference_steps``."""
    scheduler = scheduler.__class__.from_config(scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler.timesteps


@torch.no_grad()
def sample_chains(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    states: Sequence[Tensor],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Chains of ``denoise`` with all that the UNet sees and puts out along them.

    Args:
        unet: As for ``denoise``.
        scheduler: As for ``denoise``.
        states: Those of the empty prompt, of the prompts, and any others whose predictions are wanted: K of them,
            (B, L, D) each.
        noise: Where the chains start, (B, C, H, W).
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of the guidance.

    Returns:
        (B, S, 1 + K, C, H, W) in the UNet's type, S as in ``chain_timesteps``: of every state x_t, scaled as the UNet
        sees it, then the predictions for each of ``states``.
    """
    steps = [
        torch.stack([part.to(unet.dtype) for part in (step.model_input, *step.noise_preds)], dim=1)
        for step in denoise(unet, scheduler, states, noise, num_inference_steps, guidance_scale)
    ]
    return torch.stack(steps, dim=1)


@torch.no_grad()
def sample_state(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    states: Sequence[Tensor],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """The state of number ``stop``, counted from 0, of chains like those of ``sample_chains``, at ``stop`` steps' cost.

    Returns:
        x_t (B, C, H, W), scaled as the UNet sees it, and t, ().
    """
    *_, step = denoise(unet, scheduler, states, noise, num_inference_steps, guidance_scale, stop)
    return step.model_input, step.timestep


class Place(NamedTuple):
    """Where a state is kept: the number of the refresh that made it, its chain there, and its number in the chain."""

    refresh: int
    chain: int
    state: int


@dataclass(frozen=True)
class ReuseSchedule:
    """Which kept state is used when: those of a refresh in a shuffled order, ``passes`` times over, then new ones.

    Attributes:
        chains: Chains made at once.
        states: States of a chain.
        passes: How often every state is used.
        seed: Seed of the orders; that of a refresh depends on it and on the refresh's number alone.
    """

    chains: int
    states: int
    passes: int
    seed: int

    @property
    def uses(self) -> int:
        """How many uses a refresh is good for."""
        return self.chains * self.states * self.passes

    def place(self, number: int) -> Place:
        """Where the state lies that is used in use ``number`` of the whole training, counted from 0."""
        refresh, use = divmod(number, self.uses)
        return Place(refresh, *divmod(_order(self, refresh)[use], self.states))

    def refreshes(self, first: int, count: int) -> range:
        """Refreshes that the uses ``first`` to ``first + count - 1`` take states from."""
        return range(first // self.uses, (first + count - 1) // self.uses + 1)


@lru_cache(maxsize=2)
def _order(schedule: ReuseSchedule, refresh: int) -> list[int]:
    generator = seeded("order", schedule.seed, refresh)
    count = schedule.chains * schedule.states
    return [number for _ in range(schedule.passes) for number in torch.randperm(count, generator=generator).tolist()]
