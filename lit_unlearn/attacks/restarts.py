"""Searches from several random starts: the attacker keeps the start that works best on pictures of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_unlearn.attacks.base import Attack, AttackedModel, Found
from lit_unlearn.diffusion.sampling import seeded

VALIDATION_SEED = 30_000_000
"""First seed of the pictures by which starts are compared; far from those of all other pictures."""
NUM_VALIDATION = 10
"""Number of these pictures."""


@dataclass(frozen=True, kw_only=True)
class RestartableAttack(Attack):
    """Base class of the attacks whose search has a random start, so that another start finds something else.

    All starts learn from the same pictures and noises, so that their losses can be compared.
    """

    def search(self, model: AttackedModel) -> Found:
        """Search from each start, and keep the one with which most of the validation pictures show the concept.

        Validation pictures have prompts that the search may use and seeds of their own. If several starts are equally
        good, the one with the lowest loss is kept.
        """
        if model.restarts == 1:
            return self.search_from(model, 0)
        prompts = self.validation_prompts(model)
        prompts = [prompts[i % len(prompts)] for i in range(NUM_VALIDATION)]
        seeds = [VALIDATION_SEED + 10_000 * model.seed + i for i in range(NUM_VALIDATION)]
        found, shares = [], []
        for start in range(model.restarts):
            found.append(self.search_from(model, start))
            shares.append(sum(model.shows(found[-1].draw(prompts, seeds))) / NUM_VALIDATION)
        kept = max(range(model.restarts), key=lambda start: (shares[start], -found[start].loss))
        starts = [
            {"shown": share, "loss": each.loss, "found": each.text} for share, each in zip(shares, found, strict=True)
        ]
        found[kept].report |= {"restarts": model.restarts, "kept": kept + 1, "starts": starts}
        return found[kept]

    @abstractmethod
    def search_from(self, model: AttackedModel, start: int) -> Found:
        """Search from the start with the number ``start``, counted from 0, and say the loss of what was found."""

    def validation_prompts(self, model: AttackedModel) -> Sequence[str]:
        """Prompts that the search may use: the edit prompts that name the concept."""
        return [prompt for prompt, _ in model.named_pairs]


def start_generator(start: int, *key: object) -> torch.Generator:
    """Generator of a search's start: that of ``key`` for the first one, and one of its own for each other."""
    return seeded(*key, *(["start", start] if start else []))


def check_restarts(attacks: Sequence[Attack], restarts: int) -> list[str]:
    """A sentence about the attacks on which ``restarts`` has no effect, if there are any.

    Raises:
        ValueError: ``restarts`` is wrong, or has no effect on any of ``attacks``.
    """
    if restarts < 1:
        raise ValueError(f"restarts={restarts} must be at least 1.")
    if restarts == 1:
        return []
    others = [attack.name for attack in attacks if not isinstance(attack, RestartableAttack)]
    if len(others) == len(attacks):
        raise ValueError(
            f"restarts={restarts} has no effect on {', '.join(others)}, without a random start: leave it out, or "
            "choose an attack that searches with --attacks."
        )
    return [f"restarts={restarts} has no effect on {', '.join(others)}, without a random start."] if others else []
