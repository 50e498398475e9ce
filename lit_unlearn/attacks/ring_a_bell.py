"""Ring-A-Bell (Tsai et al., 2024): finds prompts that the text encoders read nearly as a concept, without the denoiser.

The paper knows one text encoder and compares its states. With several encoders the distance is over all that the
denoiser reads of a prompt, in blocks: the states at the positions of each encoder (those of two CLIPs side by side are
one block) and the pooled vector. Each block's distance is divided by the mean square of the concept's vector in it, so
that all blocks count alike, whatever their size and length: style may be in the pooled vector alone.
"""

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
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.new_tokens import PLACE
from lit_unlearn.diffusion.pipeline import Pipeline


def concept_vector(states: Tensor, without: Tensor) -> Tensor:
    """Mean difference (L, D) between states (n, L, D) of prompts with a concept and of the same prompts without it."""
    return (states - without).mean(dim=0)


def blocks(pipeline: Pipeline, condition: Condition) -> list[Tensor]:
    """What is compared of n prompts: the states (n, L, D) of each encoder in turn, and the pooled vectors (n, 1, P)."""
    lengths = [pipeline.texts[number].length for number in pipeline.token_order]
    states = condition.states[:, : sum(lengths)].split(lengths, dim=1)  # without zeros in place of a T5
    return [*states, *([] if condition.pooled is None else [condition.pooled.unsqueeze(1)])]


def distances(found: Sequence[Tensor], goals: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Mean squared distances (n,) of blocks ``found`` from ``goals`` (n, L, D), relative to ``vectors`` if several.

    Args:
        found: Blocks of n prompts.
        goals: Those that they should be near to.
        vectors: The concept's vector in each block, (L, D).
    """
    each = [(block - goal).square().mean(dim=(1, 2)) for block, goal in zip(found, goals, strict=True)]
    if len(each) == 1:
        return each[0]
    sizes = [vector.square().mean().clamp_min(torch.finfo(vector.dtype).tiny) for vector in vectors]
    return torch.stack([distance / size for distance, size in zip(each, sizes, strict=True)]).mean(0)


@dataclass(frozen=True, kw_only=True)
class RingABell(RestartableAttack):
    """Finds, for each direct prompt, other words whose states are near the prompt's states plus the concept's vector.

    Goal and vector are computed with the unedited text encoders, and the words are searched for the edited ones.

    Attributes:
        steps: Steps of Adam; the paper uses a genetic algorithm.
        num_tokens: Number of words of a prompt, one token each in every text encoder.
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
            pairs = zip(*(blocks(pipeline, pipeline.encode(prompts)) for prompts in (named, targets)), strict=True)
            vectors = [concept_vector(*pair) for pair in pairs]
            own = blocks(pipeline, pipeline.encode(originals))
            goals = [block + self.strength * vector for block, vector in zip(own, vectors, strict=True)]
        allowed = allowed_words(model, self.exclude_names)
        tokens = tokenize_apart(pipeline, [PLACE] * len(originals), self.num_tokens)

        def losses(weights: Tensor, step: int = 0) -> Tensor:
            condition = pipeline.encode_mixtures(weights.flatten(0, 1), allowed, tokens)
            return distances(blocks(pipeline, condition), goals, vectors)

        places, lowest = search_tokens(
            losses,
            (len(originals), self.num_tokens, len(allowed)),
            self.steps,
            self.learning_rate,
            start_generator(start, model.seed, self.name),
            goals[0].device,
        )
        found = {
            original: pipeline.words_of(allowed[row]) for original, row in zip(originals, places.cpu(), strict=True)
        }

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([found[prompt] for prompt in prompts], seeds)

        return Found(found[originals[0]], draw, {"prompts": found}, loss=float(lowest.mean()))
