"""Relearning: fine-tunes the edited model, to see how few steps bring the concept back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from lit_unlearn.attacks.base import (
    REFERENCE_SEED,
    Attack,
    AttackCost,
    AttackedModel,
    Found,
    References,
    denoising_errors,
    noise_draws,
)
from lit_unlearn.attacks.low_rank import FullChanges, LowRankChanges, full_rank
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.sampling import seeded

RATE, LOW_RANK_RATE = 1e-3, 1e-2
"""Learning rates that suit emoji-sd: of weights, and of factors, whose product is small at first."""
NUM_OTHERS = 40
"""Number of pictures of retained concepts to learn from."""


@contextmanager
def trained(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Make ``parameters`` trainable within the block; afterwards they are frozen and have their old values."""
    weights = list(parameters.values())
    with PretrainedValues(parameters).restored():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield weights
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None


@dataclass(frozen=True, kw_only=True)
class Relearning(Attack):
    """Trains the edited weights on the unedited model's pictures of the concept and their prompts.

    Attributes:
        steps: Steps of Adam.
        learning_rate: Learning rate of what is trained; null takes 1e-3, with a rank 1e-2.
        batch_size: Number of noised pictures in a step.
        threshold: The concept counts as back if at least this share of the pictures shows it.
        pictures: Train on pictures of the concept, or of others, the retained concepts, with their own prompts.
        rank: Train a LoRA of this rank (W + B A, only A and B) and not the weights themselves; null trains the weights.
        parts: Train the edited weights, or all weights of the denoiser.
    """

    name: ClassVar[str] = "relearning"

    steps: int = 32
    learning_rate: float | None = None
    batch_size: int = 4
    threshold: float = 0.5
    pictures: Literal["concept", "others"] = "concept"
    rank: int | None = None
    parts: Literal["edited", "all"] = "edited"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"{self.name}.threshold={self.threshold} must be larger than 0 and at most 1.")
        for name in ("pictures", "parts"):
            known = get_args(get_type_hints(Relearning)[name])
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{self.name}.{name}={value!r} must be {' or '.join(known)}.")

    @property
    def rate(self) -> float:
        """The learning rate."""
        usual = RATE if self.rank is None else LOW_RANK_RATE
        return usual if self.learning_rate is None else self.learning_rate

    def settings(self) -> dict[str, Any]:
        """As in the base class, with the learning rate that is used."""
        return {**super().settings(), "learning_rate": self.rate}

    @property
    def label(self) -> str:
        """The name with what is unusual, such as ``relearning_others_rank4_all``."""
        return "_".join(
            [
                self.name,
                *(["others"] if self.pictures == "others" else []),
                *([f"rank{self.rank}"] if self.rank else []),
                *(["all"] if self.parts == "all" else []),
            ]
        )

    @property
    def learns_from_pictures(self) -> bool:  # type: ignore[override]
        """Whether it learns from pictures of the concept."""
        return self.pictures == "concept"

    @property
    def learns_from_others(self) -> bool:  # type: ignore[override]
        """Whether it learns from pictures of the retained concepts."""
        return self.pictures == "others"

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse a rank that limits none of the edited ``weights``.

        Raises:
            ValueError: None of them is a matrix, or the rank is at least the full rank of all of them.
        """
        if self.rank is None or self.parts == "all":
            return
        largest = max((full_rank(weight) for weight in weights.values()), default=0)
        if not largest:
            raise ValueError(f"{self.name}.rank={self.rank}: none of the edited weights is a matrix, so leave it out.")
        if self.rank >= largest:
            raise ValueError(
                f"{self.name}.rank={self.rank} must be less than {largest}, the full rank of the edited weights: lower "
                "it, or leave it out to train the weights themselves."
            )

    def search(self, model: AttackedModel) -> Found:
        """Train, check after 1, 2, 4, ... and the last step whether the concept is back, and restore the weights."""
        pipeline = model.pipeline
        references = model.references if self.pictures == "concept" else draw_others(model)
        latents = references.latents
        tokens = pipeline.tokenize(references.prompts)
        parameters = model.pretrained.parameters if self.parts == "edited" else denoiser_parameters(model)
        if self.rank is not None:
            parameters = {name: parameter for name, parameter in parameters.items() if full_rank(parameter)}
        curve: list[list[float]] = []
        with trained(parameters) as weights:
            changes = (
                FullChanges(weights)
                if self.rank is None
                else LowRankChanges(weights, self.rank, seeded(model.seed, self.name, "rank"))
            )
            optimizer = torch.optim.Adam(changes.factors, lr=self.rate)
            for step in range(1, self.steps + 1):
                generators = [seeded(model.seed, self.name, step, item) for item in range(self.batch_size)]
                rows, noise, timesteps = noise_draws(latents, pipeline.noise, generators)
                condition = pipeline.encode(tokens[rows])
                loss = denoising_errors(pipeline, condition, latents[rows], noise, timesteps).mean()
                changes.backward(torch.autograd.grad(loss, weights))
                optimizer.step()
                changes.write()
                if step & (step - 1) == 0 or step == self.steps:
                    verdicts = model.verdicts(model.draw(model.prompts, model.seeds))
                    curve.append([step, sum(verdicts) / len(verdicts)])
            relearned = PretrainedValues(parameters)

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            with relearned.restored():
                return model.draw(prompts, seeds)

        needed = next((int(step) for step, share in curve if share >= self.threshold), None)
        text = f"back after {needed} steps" if needed else f"not back after {self.steps} steps"
        return Found(text, draw, {"steps_needed": needed, "curve": curve})


def denoiser_parameters(model: AttackedModel) -> dict[str, nn.Parameter]:
    """All weights of the denoiser, by full name."""
    prefix = f"{model.pipeline.denoiser_part}."
    return {name: p for name, p in model.pipeline.named_parameters().items() if name.startswith(prefix)}


def draw_others(model: AttackedModel) -> References:
    """Pictures of the retained concepts by the unedited model, and of none in which the judge sees the edited concept.

    Their prompts are spread evenly over the retained prompts.

    Raises:
        ValueError: The judge sees the edited concept in all of them.
    """
    others = model.others
    prompts = [others[number * len(others) // NUM_OTHERS] for number in range(NUM_OTHERS)]
    latents = model.unedited_latents(prompts, [REFERENCE_SEED + 10_000 * model.seed + i for i in range(NUM_OTHERS)])
    shows = model.shows(torch.cat([model.pipeline.decode(part) for part in latents.split(10)]))
    kept = [number for number, shown in enumerate(shows) if not shown]
    if not kept:
        raise ValueError(
            f"{model.concept.name}: the judge {model.judge.name!r} sees it in all of {NUM_OTHERS} pictures of retained "
            "concepts, so there is nothing else to learn from: give another judge with --judge."
        )
    return References([prompts[number] for number in kept], latents[kept], AttackCost())
