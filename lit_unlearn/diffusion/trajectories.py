"""Sampling chains whose states are kept for training, and the order in which a training uses them."""

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
    """Run the chains of ``Pipeline.chain``, and return all inputs and outputs of the denoiser along them.

    Args:
        pipeline: The pipeline that samples.
        conditions: K conditions: that of the empty prompt, that of the prompts, and any others to predict for.
        noise: Initial noise of the chains, (B, C, H, W).
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of the guidance.
        generators: Of each chain, as of ``Pipeline.chain``.

    Returns:
        (B, S, 1 + K, C, H, W) in the denoiser's type, S as in ``DDPM.timesteps``: for every state, x_t scaled as the
        denoiser's input, then the predictions for each of ``conditions``.
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
    """State number ``stop``, counted from 0, of chains as in ``sample_chains``; it costs ``stop`` sampler steps.

    Returns:
        x_t (B, C, H, W), scaled as the denoiser's input, and t, ().
    """
    *_, step = pipeline.chain(conditions, noise, num_inference_steps, guidance_scale, stop, generators)
    return step.model_input, step.timestep


class Place(NamedTuple):
    """Place of a kept state: the number of the refresh that made it, its chain there, and its number in the chain."""

    refresh: int
    chain: int
    state: int


@dataclass(frozen=True)
class ReuseSchedule:
    """The order in which kept states are used: those of a refresh ``passes`` times, shuffled, then those of the next.

    Attributes:
        chains: Number of chains made at once.
        states: Number of states of a chain.
        passes: How often every state is used.
        seed: Seed of the orders; the order of a refresh depends only on the seed and the refresh's number.
    """

    chains: int
    states: int
    passes: int
    seed: int

    @property
    def uses(self) -> int:
        """Number of uses of a refresh."""
        return self.chains * self.states * self.passes

    def place(self, number: int) -> Place:
        """Place of the state for use ``number`` of the whole training, counted from 0."""
        refresh, use = divmod(number, self.uses)
        return Place(refresh, *divmod(_order(self, refresh)[use], self.states))

    def refreshes(self, first: int, count: int) -> range:
        """Refreshes whose states are used in the uses ``first`` to ``first + count - 1``."""
        return range(first // self.uses, (first + count - 1) // self.uses + 1)


@lru_cache(maxsize=2)
def _order(schedule: ReuseSchedule, refresh: int) -> list[int]:
    generator = seeded("order", schedule.seed, refresh)
    count = schedule.chains * schedule.states
    return [number for _ in range(schedule.passes) for number in torch.randperm(count, generator=generator).tolist()]
