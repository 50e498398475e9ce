"""Shared by all attacks: the edited model, pictures of the concept to learn from, the result, and its cost."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_unlearn.data.concepts import Concept
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import (
    count_forwards,
)
from lit_unlearn.judges.base import Judge, judge_questions

Draw = Callable[[Sequence[str], Sequence[int]], Tensor]
"""From prompts and seeds to pictures (B, 3, H, W), float32 in [0, 1] on the CPU."""

PICTURE_SEED, REFERENCE_SEED = 10_000_000, 20_000_000
"""First seeds of the judged pictures and of the pictures to learn from; both are far from the seeds of a test."""
NUM_REFERENCES, REFERENCE_ROUNDS = 10, 3
"""Number of pictures to learn from, and how many times as many are drawn at most to find them."""
DRAW_BATCH = 10
"""Pictures drawn at once."""


@dataclass(frozen=True)
class AttackCost:
    """Cost of an attack: wall-clock seconds, and the number of latents that passed through the UNet."""

    seconds: float = 0.0
    unet_forwards: int = 0
    unet_backwards: int = 0

    def __add__(self, other: AttackCost) -> AttackCost:
        return AttackCost(
            self.seconds + other.seconds,
            self.unet_forwards + other.unet_forwards,
            self.unet_backwards + other.unet_backwards,
        )


class Meter:
    """Has the ``cost`` of a block of ``measure`` after the block has ended."""

    cost = AttackCost()


@contextmanager
def measure(denoiser: torch.nn.Module) -> Iterator[Meter]:
    """Measure the cost of the block."""
    meter, started = Meter(), time.perf_counter()
    with count_forwards(denoiser) as counter:
        yield meter
    meter.cost = AttackCost(time.perf_counter() - started, counter.count, counter.backward)


@dataclass(frozen=True)
class References:
    """Pictures of the concept by the unedited model; according to the judge all of them show it.

    Attributes:
        prompts: The prompt of each picture.
        latents: The pictures' latents, (n, C, H, W).
        cost: Cost of making them.
    """

    prompts: list[str]
    latents: Tensor
    cost: AttackCost


@dataclass
class AttackedModel:
    """An edited model, one of its edited concepts, and the settings for drawing and judging pictures of the concept.

    Attributes:
        pipeline: The edited pipeline, frozen.
        pretrained: The values of the edited weights before the edit.
        concept: The edited concept.
        judge: The judge; it answers whether a picture shows the concept.
        num_inference_steps: Denoising steps of every picture.
        guidance_scale: Strength of classifier-free guidance of every picture.
        num_pictures: Number of pictures that are judged for each attack.
        seed: Seed of judged pictures, pictures to learn from and searches.
        restarts: Number of starts of each search that has a random start.
        others: Prompts of the retained concepts, for attacks that learn from pictures of these.
    """

    pipeline: Pipeline
    pretrained: PretrainedValues
    concept: Concept
    judge: Judge
    num_inference_steps: int
    guidance_scale: float
    num_pictures: int = 10
    seed: int = 0
    restarts: int = 1
    others: Sequence[str] = ()

    @property
    def prompts(self) -> list[str]:
        """The prompt of each judged picture: the concept's direct prompts, in turn."""
        return [self.concept.direct[i % len(self.concept.direct)] for i in range(self.num_pictures)]

    @property
    def seeds(self) -> list[int]:
        """The seed of each judged picture."""
        return [PICTURE_SEED + 10_000 * self.seed + i for i in range(self.num_pictures)]

    @property
    def named_pairs(self) -> list[tuple[str, str]]:
        """Edit prompts that name the concept, each with its target prompt; all edit prompts if none names it."""
        pairs = list(zip(self.concept.edit_prompts, self.concept.target_prompts, strict=True))
        return [pair for pair in pairs if self.concept.find_name(pair[0])] or pairs

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1] on the CPU, by the weights as they are."""
        return self.draw_condition(self.pipeline.encode(prompts), seeds)

    @torch.no_grad()
    def draw_condition(self, condition: Condition, seeds: Sequence[int]) -> Tensor:
        """As ``draw``, for the condition of B prompts."""
        parts = [
            self.pipeline.decode(self._latents(part, part_seeds))
            for part, part_seeds in zip(condition.split(DRAW_BATCH), _batches(seeds), strict=True)
        ]
        return torch.cat(parts)

    def _latents(self, condition: Condition, seeds: Sequence[int]) -> Tensor:
        return self.pipeline.draw_latents(condition, seeds, self.num_inference_steps, self.guidance_scale)

    def verdicts(self, pictures: Tensor) -> list[bool]:
        """Whether each of ``pictures`` (B, 3, H, W) shows the concept; pictures without an answer are left out.

        Raises:
            ValueError: The judge gave no answer for any picture.
        """
        answers = judge_questions(self.judge, pictures, [self.concept.question] * len(pictures))
        verdicts = [bool(answer >= 0.5) for answer in answers[~answers.isnan()]]
        if not verdicts:
            raise ValueError(
                f"The judge {self.judge.name!r} gave no answer for any of {len(pictures)} pictures of "
                f"{self.concept.name}: give another judge with --judge."
            )
        return verdicts

    def shows(self, pictures: Tensor) -> list[bool]:
        """Whether the judge sees the concept in each of ``pictures`` (B, 3, H, W); without an answer it does not."""
        answers = judge_questions(self.judge, pictures, [self.concept.question] * len(pictures))
        return [bool(answer >= 0.5) for answer in answers]

    @torch.no_grad()
    def unedited_latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents (B, C, H, W) of pictures by the unedited model."""
        with self.pretrained.restored():
            parts = self.pipeline.encode(prompts).split(DRAW_BATCH)
            return torch.cat([self._latents(*part) for part in zip(parts, _batches(seeds), strict=True)])

    @cached_property
    def references(self) -> References:
        """Pictures to learn from: the unedited model draws edit prompts that name the concept, and the judge selects.

        Raises:
            ValueError: No picture of the unedited model shows the concept.
        """
        named = [prompt for prompt, _ in self.named_pairs]
        prompts: list[str] = []
        latents: list[Tensor] = []
        with measure(self.pipeline.denoiser) as meter, self.pretrained.restored():
            for first in range(0, NUM_REFERENCES * REFERENCE_ROUNDS, NUM_REFERENCES):
                numbers = range(first, first + NUM_REFERENCES)
                texts = [named[number % len(named)] for number in numbers]
                seeds = [REFERENCE_SEED + 10_000 * self.seed + number for number in numbers]
                drawn = self._latents(self.pipeline.encode(texts).detach(), seeds)
                pictures = self.pipeline.decode(drawn)
                answers = judge_questions(self.judge, pictures, [self.concept.question] * len(pictures))
                for place in (answers >= 0.5).nonzero().flatten().tolist():
                    prompts.append(texts[place])
                    latents.append(drawn[place])
                if len(prompts) >= NUM_REFERENCES:
                    break
        if not prompts:
            raise ValueError(
                f"{self.concept.name}: according to the judge {self.judge.name!r} the unedited model shows it in none "
                f"of {NUM_REFERENCES * REFERENCE_ROUNDS} pictures, so there is nothing to attack with."
            )
        return References(prompts[:NUM_REFERENCES], torch.stack(latents[:NUM_REFERENCES]), meter.cost)


@dataclass
class Found:
    """The result of an attack.

    Attributes:
        text: A prompt, or a description of what brings the concept back.
        draw: Draws pictures of the concept's prompts under the attack.
        report: Facts about the search, as values of JSON.
        embeddings: Learned embeddings (n, D), if the attack learns some.
        cost: Cost of the search, including the pictures to learn from.
        loss: Loss of what was found, comparable between starts of the search.
    """

    text: str
    draw: Draw
    report: dict[str, Any] = field(default_factory=dict)
    embeddings: Tensor | None = None
    cost: AttackCost = AttackCost()
    loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base class of the attacks; the settings of an attack are its fields.

    Attributes:
        steps: Number of steps of the search.

    Raises:
        ValueError: A field is wrong.
    """

    name: ClassVar[str]
    learns_from_pictures: ClassVar[bool] = True
    learns_from_others: ClassVar[bool] = False

    steps: int = 100

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{self.name}.{name}={value} must be at least 1.")
            if name in ("learning_rate", "strength") and not 0 < value < float("inf"):
                raise ValueError(f"{self.name}.{name}={value} must be a positive number.")

    def settings(self) -> dict[str, Any]:
        """The fields as values of JSON."""
        return asdict(self)

    @property
    def label(self) -> str:
        """Name of the result: the attack's name, and what distinguishes this variant from the usual one."""
        return self.name

    def check(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027 - there may be nothing to refuse
        """Refuse edited ``weights`` (by full name) that the attack cannot work with, before a model is loaded.

        Raises:
            ValueError: It cannot work with them.
        """

    def run(self, model: AttackedModel) -> Found:
        """Search and measure the cost; the weights are restored afterwards.

        Raises:
            ValueError: The attack finds no pictures to learn from.
        """
        learned_from = model.references.cost if self.learns_from_pictures else AttackCost()
        with measure(model.pipeline.denoiser) as meter:
            found = self.search(model)
        found.cost = learned_from + meter.cost
        return found

    @abstractmethod
    def search(self, model: AttackedModel) -> Found:
        """Search for a prompt or a change that brings the concept back."""


def denoising_errors(
    pipeline: Pipeline, condition: Condition, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error (B,) of the UNet's prediction on noised ``latents`` (B, C, H, W), as in its training.

    Args:
        pipeline: Any pipeline, edited or not.
        condition: Condition of the B prompts.
        latents: Latents of pictures, (B, C, H, W).
        noise: Standard normal, (B, C, H, W).
        timesteps: (B,).
    """
    output = pipeline.predict(pipeline.noise.add(latents, noise, timesteps), timesteps, condition)
    target = pipeline.noise.target(latents, noise, timesteps)
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def noise_draws(
    latents: Tensor, num_timesteps: int, generators: Sequence[torch.Generator], window: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the inputs of a step: for each generator a row of ``latents`` (n, C, H, W), noise and a timestep.

    Args:
        latents: Latents of the pictures to learn from.
        num_timesteps: Number of timesteps in the model's training.
        generators: Generators on the CPU; each draws one item.
        window: Range of timesteps to draw from, as shares of all timesteps.

    Returns:
        Rows (B,) on the CPU; noise (B, C, H, W) and timesteps (B,) on the device of the latents.
    """
    low, high = (round(share * num_timesteps) for share in window)
    rows, noise, timesteps = [], [], []
    for generator in generators:
        rows.append(torch.randint(len(latents), (), generator=generator))
        timesteps.append(torch.randint(low, high, (), generator=generator))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(rows), torch.stack(noise).to(latents), torch.stack(timesteps).to(latents.device)


def _batches(seeds: Sequence[int]) -> list[Sequence[int]]:
    return [seeds[start : start + DRAW_BATCH] for start in range(0, len(seeds), DRAW_BATCH)]
