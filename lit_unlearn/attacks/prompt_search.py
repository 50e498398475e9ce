"""Discrete prompt search by gradient, similar to UnlearnDiffAtk (Zhang et al., 2024) and P4D (Chin et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Found, denoising_errors, noise_draws
from lit_unlearn.attacks.token_search import search_tokens
from lit_unlearn.diffusion.new_tokens import PLACE
from lit_unlearn.diffusion.sampling import seeded

SCORED = 16
"""Number of noised pictures, always the same ones, on which the discrete prompts of a search are compared."""


@dataclass(frozen=True, kw_only=True)
class PromptSearch(Attack):
    """Finds one prefix for all prompts of the concept, with which the edited model best denoises its pictures.

    The search uses edit prompts and the unedited model's pictures of them. It does not use the direct prompts, on which
    the prefix is judged.

    Attributes:
        steps: Steps of Adam.
        num_tokens: Number of words of the prefix, one token each.
        learning_rate: Learning rate of the relaxed one-hot weights.
        batch_size: Number of noised pictures in a step.
        window: Range of timesteps to draw from, as fractions of all, where the prompt matters most.
        straight_through: Compute the loss on single tokens (P4D) or, if false, on mixtures (UnlearnDiffAtk).
        exclude_names: Do not use the concept's own names as words.
    """

    name: ClassVar[str] = "prompt_search"

    steps: int = 100
    num_tokens: int = 5
    learning_rate: float = 0.1
    batch_size: int = 8
    window: tuple[float, float] = (0.3, 0.9)
    straight_through: bool = True
    exclude_names: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"{self.name}.window={self.window} must be two shares between 0 and 1, the lower first.")

    def search(self, model: AttackedModel) -> Found:
        """Find the prefix."""
        pipeline, references = model.pipeline, model.references
        latents, num_timesteps = references.latents, pipeline.noise.num_timesteps
        allowed = allowed_words(model, self.exclude_names)
        templates = [f"{PLACE} {prompt}" for prompt in references.prompts]
        tokens = pipeline.tokenize_templates(templates, self.num_tokens)

        def errors(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            rows, noise, timesteps = noise_draws(latents, num_timesteps, generators, self.window)
            condition = pipeline.encode_mixtures(weights[0], allowed, tokens[rows])
            return denoising_errors(pipeline, condition, latents[rows], noise, timesteps).mean()[None]

        def losses(weights: Tensor, step: int) -> Tensor:
            return errors(weights, [seeded(model.seed, self.name, step, item) for item in range(self.batch_size)])

        def score(weights: Tensor) -> Tensor:
            return errors(weights, [seeded(model.seed, self.name, "score", item) for item in range(SCORED)])

        (places,) = search_tokens(
            losses,
            (1, self.num_tokens, len(allowed)),
            self.steps,
            self.learning_rate,
            seeded(model.seed, self.name),
            latents.device,
            self.straight_through,
            score,
        )
        prefix = pipeline.text.words_of(allowed[places.cpu()].tolist())

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([f"{prefix} {prompt}" for prompt in prompts], seeds)

        return Found(f"{prefix} {model.prompts[0]}", draw, {"prefix": prefix})


def allowed_words(model: AttackedModel, exclude_names: bool) -> Tensor:
    """Numbers (A,) of the tokens that a searched prompt may contain."""
    text, concept = model.pipeline.text, model.concept
    return text.whole_words(concept.find_name, concept.names) if exclude_names else text.whole_words()
