"""Pictures that a model draws for its edit, and their noise: each depends only on the seed and its own number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.sampling import seeded

if TYPE_CHECKING:
    from lit_unlearn.methods.value_refinement import ValueRefinement

UNET_BATCH = 16
"""Largest number of latents that go through the denoiser at once, since its inner states are large."""


def drawn(method: ValueRefinement, condition: Condition, first_seed: int) -> Tensor:
    """Latents (n, C, H, W) of pictures of the n prompts of ``condition``, divided among processes.

    Args:
        method: The method, whose pipeline draws them as it is now.
        condition: The prompts.
        first_seed: The seed of the first picture, counted from the method's own; the others follow.
    """

    def make(places: list[int]) -> Tensor:
        parts = [places[start : start + UNET_BATCH] for start in range(0, len(places), UNET_BATCH)]
        seeds = [[method.seed + first_seed + place for place in part] for part in parts]
        settings = method.num_inference_steps, method.guidance_scale
        draw = method.pipeline.draw_latents
        return torch.cat([draw(condition[part], own, *settings) for part, own in zip(parts, seeds, strict=True)])

    return method.processes.made_once(len(condition), make)


def edit_latents(method: ValueRefinement) -> Tensor:
    """Latents (latents_per_prompt, n, C, H, W) of pictures of the edit prompts, drawn by the model as it is now."""
    condition = method.pipeline.encode_many(method.paired.edit_tokens)
    return torch.stack([drawn(method, condition, 100_000 * number) for number in range(method.latents_per_prompt)])


def noised(method: ValueRefinement, latents: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Add noise to each of ``latents`` (n, C, H, W) at its own random timestep; return x_t (n, C, H, W) and t (n,)."""
    noise, timesteps = [], []
    for place in range(len(latents)):
        generator = seeded(method.seed, label, place)
        timesteps.append(method.pipeline.noise.draw_timestep(generator, method.min_timestep, method.max_timestep))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    times = torch.stack(timesteps).to(latents.device)
    return method.pipeline.noise.add(latents, torch.stack(noise).to(latents), times), times


def noise_of_items(
    method: ValueRefinement, drawings: Tensor, batch: Tensor, batch_idx: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents and noise (B, C, H, W) and timesteps (B,), drawn per item of the global batch.

    They depend only on seed, round, step and item, so the loss is the same with any number of processes, and the goals
    are the same for all layers of a round (``RoundGoals``).

    Args:
        method: The method.
        drawings: Latents of each prompt pair, (drawings of a prompt, pairs, C, H, W).
        batch: Numbers of items, (B,); those of prompt pairs, modulo their number.
        batch_idx: Number of the step within the epoch.
    """
    latents, noise, timesteps = [], [], []
    for item in batch.tolist():
        pair = item % method.num_pairs
        generator = seeded(method.seed, method.current_round, batch_idx, item)
        timesteps.append(method.pipeline.noise.draw_timestep(generator, method.min_timestep, method.max_timestep))
        number = int(torch.randint(len(drawings), (), generator=generator))
        latents.append(drawings[number, pair])
        noise.append(torch.randn(drawings.shape[2:], generator=generator))
    clean = torch.stack(latents)
    return clean, torch.stack(noise).to(clean), torch.stack(timesteps).to(method.device)


@dataclass
class RoundGoals:
    """Predictions for the target prompts in each step of a round, which are the same for every layer.

    The first layer of a round asks the denoiser for them; the others find them here. Beyond ``MOST_BYTES`` they are
    asked for again, and the next round drops them.

    Attributes:
        number: Number of the round.
        found: The predictions (B, C, H, W) by the number of the step and those of its items.
    """

    MOST_BYTES: ClassVar[int] = 2**28

    number: int = -1
    found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def kept(cls, steps: int, size: int) -> int:
        """Of how many of the ``steps`` of a round the predictions are kept, if those of one take ``size`` bytes."""
        return min(steps, cls.MOST_BYTES // size)

    def of(self, number: int, step: int, batch: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """The predictions for the items ``batch`` (B,) of ``step`` in the round ``number``, by ``predict`` if new."""
        if number != self.number:
            self.number, self.found = number, {}
        place = (step, *batch.tolist())
        if (known := self.found.get(place)) is not None:
            return known
        predicted = predict()
        if sum(kept.nbytes for kept in self.found.values()) + predicted.nbytes <= self.MOST_BYTES:
            self.found[place] = predicted.clone()  # it may be a part of something larger
        return predicted
