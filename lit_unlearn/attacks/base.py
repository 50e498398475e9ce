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
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.noise import NoiseProcess
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import count_forwards
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
    """Cost of an attack: wall-clock seconds, and the number of latents that passed through the denoiser."""

    seconds: float = 0.0
    unet_forwards: int = 0
    unet_backwards: int = 0

    def __add__(self, other: AttackCost) -> AttackCost:
        return AttackCost(
            self.seconds + other.seconds,
            self.unet_forwards + other.unet_forwards,
            self.unet_backwards + other.unet_backwards,
        )

    def __sub__(self, other: AttackCost) -> AttackCost:
        return self + AttackCost(-other.seconds, -other.unet_forwards, -other.unet_backwards)


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
        negative_prompt: Prompt that the guidance leads away from; None for the empty one.
        run_guidance_scale: Guidance of the pictures to learn from; None for that of every picture.
        unrelated: Prompts of retained concepts, to see how often the judge sees the concept where it is not asked for.
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
    negative_prompt: str | None = None
    run_guidance_scale: float | None = None
    unrelated: Sequence[str] = ()

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
        return self.pipeline.draw_latents(
            condition, seeds, self.num_inference_steps, self.guidance_scale, self.unconditional()
        )

    def unconditional(self) -> Condition | None:
        """Condition of the negative prompt, by the weights as they are; None for that of the empty prompt."""
        return None if self.negative_prompt is None else self.pipeline.unskipped.encode([self.negative_prompt])

    def guided(self, condition: Condition) -> list[Condition]:
        """The conditions that a chain with the attacker's guidance needs for ``condition``."""
        return self.pipeline.guided(condition, self.guidance_scale, self.unconditional())

    def answers(self, pictures: Tensor) -> Tensor:
        """Probability (B,) that each of ``pictures`` (B, 3, H, W) shows the concept; nan where there is no answer."""
        return judge_questions(self.judge, pictures, [self.concept.question] * len(pictures))

    def verdicts(self, pictures: Tensor) -> list[bool]:
        """Whether each of ``pictures`` (B, 3, H, W) shows the concept; pictures without an answer are left out.

        Raises:
            ValueError: The judge gave no answer for any picture.
        """
        answers = self.answers(pictures)
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
        """Latents (B, C, H, W) of pictures by the unedited model, drawn as the run draws, whoever attacks."""
        scale = self.guidance_scale if self.run_guidance_scale is None else self.run_guidance_scale
        with self.pretrained.restored():
            parts = zip(self.pipeline.encode(prompts).split(DRAW_BATCH), _batches(seeds), strict=True)
            drawn = [self.pipeline.draw_latents(*part, self.num_inference_steps, scale) for part in parts]
        return torch.cat(drawn)

    @cached_property
    def references(self) -> References:
        """Pictures to learn from: the unedited model draws edit prompts that name the concept, and the judge selects.

        Raises:
            ValueError: No picture of the unedited model shows the concept.
        """
        named = [prompt for prompt, _ in self.named_pairs]
        guidance_scale = self.guidance_scale if self.run_guidance_scale is None else self.run_guidance_scale
        prompts: list[str] = []
        latents: list[Tensor] = []
        with measure(self.pipeline.denoiser) as meter, self.pretrained.restored():
            for first in range(0, NUM_REFERENCES * REFERENCE_ROUNDS, NUM_REFERENCES):
                numbers = range(first, first + NUM_REFERENCES)
                texts = [named[number % len(named)] for number in numbers]
                seeds = [REFERENCE_SEED + 10_000 * self.seed + number for number in numbers]
                condition = self.pipeline.encode(texts).detach()
                drawn = self.pipeline.draw_latents(condition, seeds, self.num_inference_steps, guidance_scale)
                answers = self.answers(self.pipeline.decode(drawn))
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
        embeddings: Learned embeddings (n, D), if the attack learns some; see ``Pipeline.initial_embeddings``.
        cost: Cost of the search, including the pictures to learn from.
        loss: Loss of what was found, comparable between starts of the search.
        controls: Draw pictures that show what the help of the attack shows without the concept's prompt, by name.
        uncounted: Cost of pictures that the search has drawn for comparison only; it is not part of ``cost``.
    """

    text: str
    draw: Draw
    report: dict[str, Any] = field(default_factory=dict)
    embeddings: Tensor | None = None
    cost: AttackCost = AttackCost()
    loss: float = 0.0
    controls: dict[str, Draw] = field(default_factory=dict)
    uncounted: AttackCost = AttackCost()


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base class of the attacks; the settings of an attack are its fields.

    A field called ``steps`` is the number of steps of a search, which ``--steps`` sets.

    Raises:
        ValueError: A field is wrong.
    """

    name: ClassVar[str]
    learns_from_pictures: ClassVar[bool] = True
    learns_from_others: ClassVar[bool] = False
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Whole numbers among the fields that may be 0."""

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            least = 0 if name in self.may_be_zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{self.name}.{name}={value} must be at least {least}.")
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

    def check_run(  # noqa: B027 - there may be nothing to refuse
        self, base: BaseModel, num_inference_steps: int, guidance_scale: float
    ) -> None:
        """Refuse what the attack cannot do with this model or with these settings, before the model is loaded.

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
        found.cost = learned_from + meter.cost - found.uncounted
        return found

    @abstractmethod
    def search(self, model: AttackedModel) -> Found:
        """Search for a prompt or a change that brings the concept back."""


def denoising_errors(
    pipeline: Pipeline, condition: Condition, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error (B,) of the denoiser's prediction on noised ``latents`` (B, C, H, W), as in its training.

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
    latents: Tensor,
    process: NoiseProcess,
    generators: Sequence[torch.Generator],
    window: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the inputs of a step: for each generator a row of ``latents`` (n, C, H, W), noise and a timestep.

    Args:
        latents: Latents of the pictures to learn from.
        process: The model's noise process, which draws the timesteps.
        generators: Generators on the CPU; each draws one item.
        window: Range of timesteps to draw from, as shares of all timesteps.

    Returns:
        Rows (B,) on the CPU; noise (B, C, H, W) and timesteps (B,) on the device of the latents.
    """
    low, high = (round(share * process.num_timesteps) for share in window)
    rows, noise, timesteps = [], [], []
    for generator in generators:
        rows.append(torch.randint(len(latents), (), generator=generator))
        timesteps.append(process.draw_timestep(generator, low, high))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(rows), torch.stack(noise).to(latents), torch.stack(timesteps).to(latents.device)


def _batches(seeds: Sequence[int]) -> list[Sequence[int]]:
    return [seeds[start : start + DRAW_BATCH] for start in range(0, len(seeds), DRAW_BATCH)]
