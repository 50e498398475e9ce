"""Relearning: fine-tunes the edited weights on pictures of the concept, to see how few steps bring it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_unlearn.attacks.base import Attack, AttackedModel, Found, denoising_errors, noise_draws
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.sampling import seeded


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
    """Trains only the edited weights, on the unedited model's pictures of the concept and their prompts.

    Attributes:
        steps: Steps of Adam.
        learning_rate: Learning rate of the edited weights.
        batch_size: Number of noised pictures in a step.
        threshold: The concept counts as back if at least this share of the pictures shows it.
    """

    name: ClassVar[str] = "relearning"

    steps: int = 32
    learning_rate: float = 1e-3
    batch_size: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"{self.name}.threshold={self.threshold} must be larger than 0 and at most 1.")

    def search(self, model: AttackedModel) -> Found:
        """Train, check after 1, 2, 4, ... and the last step whether the concept is back, and restore the weights."""
        pipeline, references = model.pipeline, model.references
        latents, num_timesteps = references.latents, pipeline.noise.num_timesteps
        tokens = pipeline.tokenize(references.prompts)
        edited = model.pretrained.parameters
        curve: list[list[float]] = []
        with trained(edited) as weights:
            optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
            for step in range(1, self.steps + 1):
                generators = [seeded(model.seed, self.name, step, item) for item in range(self.batch_size)]
                rows, noise, timesteps = noise_draws(latents, num_timesteps, generators)
                condition = pipeline.encode(tokens[rows])
                loss = denoising_errors(pipeline, condition, latents[rows], noise, timesteps).mean()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
                if step & (step - 1) == 0 or step == self.steps:
                    verdicts = model.verdicts(model.draw(model.prompts, model.seeds))
                    curve.append([step, sum(verdicts) / len(verdicts)])
            relearned = PretrainedValues(edited)

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            with relearned.restored():
                return model.draw(prompts, seeds)

        needed = next((int(step) for step, share in curve if share >= self.threshold), None)
        text = f"back after {needed} steps" if needed else f"not back after {self.steps} steps"
        return Found(text, draw, {"steps_needed": needed, "curve": curve})
