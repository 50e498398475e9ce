"""Ring-A-Bell (Tsai et al., 2024): finds prompts whose text states are near those of a concept, without the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel, Found
from lit_unlearn.attacks.prompt_search import allowed_words, tokenize_apart
from lit_unlearn.attacks.restarts import RestartableAttack, start_generator
from lit_unlearn.attacks.token_search import search_tokens
from lit_unlearn.diffusion.new_tokens import PLACE


def concept_vector(states: Tensor, without: Tensor) -> Tensor:
    """Mean difference (L, D) between states (n, L, D) of prompts with a concept and of the same prompts without it."""
    return (states - without).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class RingABell(RestartableAttack):
    """Finds, for each direct prompt, other words whose states are near the prompt's states plus the concept's vector.

    The goal and the vector are computed with the unedited text encoder, and the words are searched for the edited one.

    Attributes:
        steps: Steps of Adam; the paper uses a genetic algorithm.
        num_tokens: Number of words of a prompt, one token each.
        learning_rate: Learning rate of the relaxed one-hot weights.
        strength: η, the factor of the concept's vector.
        exclude_names: Do not use the concept's own names as words.
    """

    name: ClassVar[str] = "ring_a_bell"
    learns_from_pictures: ClassVar[bool] = False

    steps: int = 100
    num_tokens: int = 8
    learning_rate: float = 0.1
    strength: float = 1.0
    exclude_names: bool = True

    def validation_prompts(self, model: AttackedModel) -> Sequence[str]:
        """The direct prompts, since these are rewritten."""
        return list(dict.fromkeys(model.prompts))

    def search_from(self, model: AttackedModel, start: int) -> Found:
        """Find the prompts."""
        pipeline = model.pipeline
        originals = list(dict.fromkeys(model.prompts))
        with torch.no_grad(), model.pretrained.restored():
            named, targets = (list(prompts) for prompts in zip(*model.named_pairs, strict=True))
            vector = concept_vector(pipeline.encode(named).states, pipeline.encode(targets).states)
            goal = pipeline.encode(originals).states + self.strength * vector
        allowed = allowed_words(model, self.exclude_names)
        tokens = tokenize_apart(pipeline, [PLACE] * len(originals), self.num_tokens)

        def losses(weights: Tensor, step: int = 0) -> Tensor:
            states = pipeline.encode_mixtures(weights.flatten(0, 1), allowed, tokens).states
            return (states - goal).square().mean(dim=(1, 2))

        places, distances = search_tokens(
            losses,
            (len(originals), self.num_tokens, len(allowed)),
            self.steps,
            self.learning_rate,
            start_generator(start, model.seed, self.name),
            goal.device,
        )
        found = {
            original: pipeline.text.words_of(allowed[row].tolist())
            for original, row in zip(originals, places.cpu(), strict=True)
        }

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([found[prompt] for prompt in prompts], seeds)

        return Found(found[originals[0]], draw, {"prompts": found}, loss=float(distances.mean()))
