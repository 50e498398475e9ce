"""Prompts at five levels, from the concept's bare name to long descriptions, after EMMA (Wei et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Found, measure
from lit_unlearn.data.concepts import Concept
from lit_unlearn.diffusion.prompts import PromptReader
from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.system.errors import UserError

LEVEL_SEED = 40_000_000
"""First seed of the pictures by which levels are compared; far from those of all other pictures."""


def level_prompts(concept: Concept, prefix: str, reader: PromptReader) -> dict[str, list[str]]:
    """The prompts of each level; all come from the concept's names and its evaluation prompts.

    - ``name``: the concept's names.
    - ``prefix``: the names in ``prefix``.
    - ``variant``: the direct prompts.
    - ``short``: the indirect prompts that have no more words than their median.
    - ``long``: each indirect prompt followed by another, if there is one, or else by a direct one. Pairs that the text
      encoder would cut are left out; if that leaves none, the longest indirect prompt.

    Args:
        concept: The concept.
        prefix: A prompt with ``{}`` for a name.
        reader: Reads prompts as the model does.

    Raises:
        UserError: The concept has no indirect prompts.
    """
    if not concept.indirect:
        raise UserError(
            f"The attack prompt_levels needs prompts that describe {concept.name!r} without its name, and its concept "
            "set has none: add some as indirect (and set prompts_per_concept), or take another attack."
        )
    counts = [len(prompt.split()) for prompt in concept.indirect]
    others = [*concept.indirect[1:], concept.indirect[0]] if len(concept.indirect) > 1 else concept.direct[:1]
    pairs = [f"{one}, {other}" for one, other in zip(concept.indirect, others, strict=True)]
    long = [pair for pair, read in zip(pairs, reader.texts(pairs), strict=True) if read == pair]
    return {
        "name": list(concept.names),
        "prefix": [prefix.format(name) for name in concept.names],
        "variant": list(concept.direct),
        "short": [prompt for prompt, count in zip(concept.indirect, counts, strict=True) if count <= median(counts)],
        "long": long or [max(concept.indirect, key=lambda prompt: len(prompt.split()))],
    }


@dataclass(frozen=True, kw_only=True)
class PromptLevels(Attack):
    """Compares prompts at five levels on pictures of its own, and is judged with the level that shows the concept most.

    The levels are those of EMMA (Wei et al., 2025): name, prefix, variant, short, long. Shares of all of them are
    reported, also those of the unedited model.

    Attributes:
        pictures: Pictures of each level, by which the levels are compared.
        prefix: Prompt of the second level, with {} for the concept's name.
    """

    name: ClassVar[str] = "prompt_levels"
    learns_from_pictures: ClassVar[bool] = False

    pictures: int = 5
    prefix: str = "a picture of {}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.prefix.count(text) for text in ("{}", "{", "}")] != [1, 1, 1]:
            raise ValueError(
                f"{self.name}.prefix={self.prefix!r} must have {{}} once, for the name, and no other brace."
            )

    def search(self, model: AttackedModel) -> Found:
        """Find the level that shows the concept most; of equal ones, the first."""
        prompts = level_prompts(model.concept, self.prefix, model.pipeline.reader)
        levels = {name: self._level(model, own) for name, own in prompts.items()}
        with measure(model.pipeline.denoiser) as meter, model.pretrained.restored():
            for name, own in prompts.items():
                levels[name]["unedited"] = self._level(model, own)["shown"]
        worst = max(levels, key=lambda name: levels[name]["shown"])
        chosen = prompts[worst]

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([chosen[i % len(chosen)] for i in range(len(prompts))], seeds)

        report = {"level": worst, "levels": levels}
        return Found(f"{worst}: {chosen[0]}", draw, report, uncounted=meter.cost)

    def _level(self, model: AttackedModel, prompts: list[str]) -> dict[str, Any]:
        """The share of pictures of ``prompts`` that show the concept, by the weights as they are."""
        seeds = [LEVEL_SEED + 10_000 * model.seed + i for i in range(self.pictures)]
        verdicts = model.verdicts(model.draw([prompts[i % len(prompts)] for i in range(self.pictures)], seeds))
        low, high = wilson_interval(sum(verdicts), len(verdicts))
        return {"shown": sum(verdicts) / len(verdicts), "interval": [low, high], "prompts": prompts}
