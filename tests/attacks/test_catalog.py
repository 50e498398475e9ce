from __future__ import annotations

import json
from typing import Any

import pytest

from lit_unlearn.attacks.catalog import ATTACKS, make_attacks
from lit_unlearn.attacks.prompt_search import PromptSearch
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.commands.attack import ATTACK_NAMES


def test_the_help_names_all_attacks() -> None:
    assert tuple(ATTACKS) == ATTACK_NAMES


def test_settings_that_are_given_go_where_they_belong() -> None:
    attacks = make_attacks(["relearning", "prompt_search"], steps=7, allow_names=True)
    assert attacks == [Relearning(steps=7), PromptSearch(steps=7, exclude_names=False)]
    assert [attack.name for attack in make_attacks()] == list(ATTACKS)
    for attack in make_attacks():
        json.dumps(attack.settings(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["prompt_serch"]}, r"attacks='prompt_serch' is no attack \(closest: prompt_search\)"),
        ({"names": ["zzz"]}, r"attacks='zzz' is no attack \(attacks: concept_inversion, prompt_search"),
        ({"names": ["relearning"] * 2}, "attacks=relearning relearning names one twice"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_bad_names_and_steps(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_attacks(**arguments)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prompt_search", {"num_tokens": 0}, r"prompt_search\.num_tokens=0 must be at least 1"),
        ("prompt_search", {"window": (0.9, 0.3)}, r"prompt_search\.window=\(0\.9, 0\.3\) must be two shares"),
        ("ring_a_bell", {"strength": float("nan")}, r"ring_a_bell\.strength=nan must be a positive number"),
        ("concept_inversion", {"learning_rate": 0.0}, r"concept_inversion\.learning_rate=0\.0 must be a positive"),
        ("relearning", {"threshold": 1.5}, r"relearning\.threshold=1\.5 must be larger than 0 and at most 1"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](**settings)
