"""What every attack shares: the edited model, pictures of the concept to learn from, what was found, and its cost."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
"""Where the seeds of the judged pictures begin, and those of the pictures to learn from: far from those of a test."""
NUM_REFERENCES, REFERENCE_ROUNDS = 10, 3
"""Pictures to learn from, and how often as many are drawn to find so many that show the concept."""
DRAW_BATCH = 10
"""Pictures drawn at once."""


@dataclass(frozen=True)
class AttackCost:
    """What an attack took: wall-clock seconds, and single latents through the UNet, some with gradients."""

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
    """Holds the ``cost`` of a block of ``measure``, once the block has ended."""

    cost = AttackCost()


@contextmanager
def measure(denoiser: torch.nn.Module) -> Iterator[Meter]:
    """Measure what the block costs."""
    meter, started = Meter(), time.perf_counter()
    with count_forwards(denoiser) as counter:
        yield meter
    meter.cost = AttackCost(time.perf_counter() - started, counter.count, counter.backward)


@dataclass(frozen=True)
class References:
    """Pictures of the concept by the unedited model, which all of them show according to the judge.

    Attributes:
        prompts: What each was drawn of.
        latents: (n, C, H, W).
        cost: Of making them.
    """

    prompts: list[str]
    latents: Tensor
    cost: AttackCost


@dataclass
class AttackedModel:
    """An edited model, one of its edited concepts, and how pictures of it are drawn and judged.

    Attributes:
        pipeline: The edited pipeline, frozen.
        pretrained: The values of the edited weights before the edit.
        concept: The concept that was edited away.
        judge: Says whether a picture shows it.
        num_inference_steps: Denoising steps of every picture.
        guidance_scale: Strength of classifier-free guidance of every picture.
        num_pictures: Pictures that an attack is judged by.
        seed: Seed of everything: pictures, pictures to learn from, searches.
    """

    pipeline: Pipeline
    pretrained: PretrainedValues
    concept: Concept
    judge: Judge
    num_inference_steps: int
    guidance_scale: float
    num_pictures: int = 10
    seed: int = 0

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
        """Edit prompts that name the concept, each with its target prompt; all of them if none does."""
        pairs = list(zip(self.concept.edit_prompts, self.concept.target_prompts, strict=True))
        return [pair for pair in pairs if self.concept.find_name(pair[0])] or pairs

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1] on the CPU, by the weights as they are."""
        return self.draw_condition(self.pipeline.encode(prompts), seeds)

    @torch.no_grad()
    def draw_condition(self, condition: Condition, seeds: Sequence[int]) -> Tensor:
        """As ``draw``, of what the denoiser is told of B prompts."""
        parts = [
            self.pipeline.decode(self._latents(part, part_seeds))
            for part, part_seeds in zip(condition.split(DRAW_BATCH), _batches(seeds), strict=True)
        ]
        return torch.cat(parts)

    def _latents(self, condition: Condition, seeds: Sequence[int]) -> Tensor:
        return self.pipeline.draw_latents(condition, seeds, self.num_inference_steps, self.guidance_scale)

    def verdicts(self, pictures: Tensor) -> list[bool]:
        """Whether each of ``pictures`` (B, 3, H, W) shows the concept; without those that the judge could not tell.

        Raises:
            ValueError: It could tell of none.
        """
        answers = judge_questions(self.judge, pictures, [self.concept.question] * len(pictures))
        verdicts = [bool(answer >= 0.5) for answer in answers[~answers.isnan()]]
        if not verdicts:
            raise ValueError(
                f"The judge {self.judge.name!r} could not tell of any of {len(pictures)} pictures whether they show "
                f"{self.concept.name}: give another one with --judge."
            )
        return verdicts

    @cached_property
    def references(self) -> References:
        """Pictures to learn from: of edit prompts that name the concept, by the unedited model, seen by the judge.

        Raises:
            ValueError: The unedited model draws none.
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
    """What an attack has found.

    Attributes:
        text: In words: a prompt, or what else brings the concept back.
        draw: Draws pictures of the concept's prompts under the attack.
        report: What there is to say of the search, as JSON can hold it.
        embeddings: Learned embeddings (n, D), if that is what was found.
        cost: Of finding it, pictures to learn from included.
    """

    text: str
    draw: Draw
    report: dict[str, Any] = field(default_factory=dict)
    embeddings: Tensor | None = None
    cost: AttackCost = AttackCost()


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base of the attacks; their settings are their fields.

    Attributes:
        steps: Steps of the search.

    Raises:
        ValueError: A field is wrong.
    """

    name: ClassVar[str]
    learns_from_pictures: ClassVar[bool] = True

    steps: int = 100

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{self.name}.{name}={value} must be at least 1.")
            if name in ("learning_rate", "strength") and not 0 < value < float("inf"):
                raise ValueError(f"{self.name}.{name}={value} must be a positive number.")

    def settings(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    def run(self, model: AttackedModel) -> Found:
        """Search, and count what that costs; the weights are left as they were.

        Raises:
            ValueError: There is nothing to attack with.
        """
        learned_from = model.references.cost if self.learns_from_pictures else AttackCost()
        with measure(model.pipeline.denoiser) as meter:
            found = self.search(model)
        found.cost = learned_from + meter.cost
        return found

    @abstractmethod
    def search(self, model: AttackedModel) -> Found:
        """Find what brings the concept back."""


def denoising_errors(
    pipeline: Pipeline, condition: Condition, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error (B,) of the UNet's prediction on noised ``latents`` (B, C, H, W), the loss of its training.

    Args:
        pipeline: Any pipeline, edited or not.
        condition: Of the B prompts.
        latents: Pictures, (B, C, H, W).
        noise: Standard normal, (B, C, H, W).
        timesteps: (B,).
    """
    output = pipeline.predict(pipeline.noise.add(latents, noise, timesteps), timesteps, condition)
    target = pipeline.noise.target(latents, noise, timesteps)
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def noise_draws(
    latents: Tensor, num_timesteps: int, generators: Sequence[torch.Generator], window: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step looks at: which of ``latents`` (n, C, H, W), with which noise, at which timesteps; one per generator.

    Args:
        latents: Pictures to learn from.
        num_timesteps: Timesteps of the model's training.
        generators: On the CPU; each draws one item.
        window: Part of the timesteps that is drawn from, as shares of all.

    Returns:
        Rows (B,) on the CPU; noise (B, C, H, W) and timesteps (B,) where the latents are.
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
