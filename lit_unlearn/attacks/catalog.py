"""The attacks by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from lit_unlearn.attacks.base import Attack
from lit_unlearn.attacks.concept_inversion import ConceptInversion
from lit_unlearn.attacks.prompt_search import PromptSearch
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.attacks.ring_a_bell import RingABell

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (ConceptInversion, PromptSearch, RingABell, Relearning)
}


def make_attacks(
    names: Sequence[str] | None = None, steps: int | None = None, allow_names: bool = False
) -> list[Attack]:
    """Some attacks, with their default settings but for what is given here.

    Args:
        names: Which ones; None for all.
        steps: Steps of each; None for each one's own.
        allow_names: Let searched prompts hold the concept's own names.

    Raises:
        ValueError: A name is unknown or given twice, or ``steps`` is less than 1.
    """
    names = list(ATTACKS) if names is None else list(names)
    for name in names:
        if name not in ATTACKS:
            close = get_close_matches(name, ATTACKS, n=1, cutoff=0.5)
            others = f"closest: {close[0]}" if close else f"attacks: {', '.join(ATTACKS)}"
            raise ValueError(f"attacks={name!r} is no attack ({others}).")
    if len(set(names)) < len(names):
        raise ValueError(f"attacks={' '.join(names)} names one twice.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    given: dict[str, Any] = {} if steps is None else {"steps": steps}
    if allow_names:
        given["exclude_names"] = False
    known = {name: {field.name for field in fields(ATTACKS[name])} for name in names}
    return [ATTACKS[name](**{k: v for k, v in given.items() if k in known[name]}) for name in names]
