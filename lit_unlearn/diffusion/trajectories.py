"""Sampling chains of which states are kept to train on, and the order in which a training uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import seeded


@torch.no_grad()
def sample_chains(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Chains of ``Pipeline.chain`` with all that the denoiser sees and puts out along them.

    Args:
        pipeline: Whose chains they are.
        conditions: Those of the empty prompt, of the prompts, and any others whose predictions are wanted: K of them.
        noise: Where the chains start, (B, C, H, W).
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of the guidance.
        generators: Of each chain, as of ``Pipeline.chain``.

    Returns:
        (B, S, 1 + K, C, H, W) in the denoiser's type, S as in ``DDPM.timesteps``: of every state x_t, scaled as the
        denoiser sees it, then the predictions for each of ``conditions``.
    """
    steps = [
        torch.stack([part.to(pipeline.dtype) for part in (step.model_input, *step.noise_preds)], dim=1)
        for step in pipeline.chain(conditions, noise, num_inference_steps, guidance_scale, generators=generators)
    ]
    return torch.stack(steps, dim=1)


@torch.no_grad()
def sample_state(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    stop: int,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Tensor, Tensor]:
    """The state of number ``stop``, counted from 0, of chains like those of ``sample_chains``, at ``stop`` steps' cost.

    Returns:
        x_t (B, C, H, W), scaled as the denoiser sees it, and t, ().
    """
    *_, step = pipeline.chain(conditions, noise, num_inference_steps, guidance_scale, stop, generators)
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
