from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_unlearn.attacks.base import Attack
from lit_unlearn.attacks.catalog import check_budget, find_attack, make_attacks, shipped_attacks
from lit_unlearn.attacks.prompt_search import PromptSearch
from lit_unlearn.attacks.relearning import Relearning


def test_settings_that_are_given_go_where_they_belong() -> None:
    attacks = make_attacks(["relearning", "prompt_search"], steps=7, allow_names=True)
    assert attacks == [Relearning(steps=7), PromptSearch(steps=7, exclude_names=False)]
    assert [attack.name for attack in make_attacks()] == list(shipped_attacks())
    for attack in make_attacks():
        json.dumps(attack.settings(), allow_nan=False)


def test_a_budget_multiplies_the_steps_of_each_attack() -> None:
    def steps(attacks: list[Attack]) -> dict[str, int]:
        return {attack.name: int(attack.settings()["steps"]) for attack in attacks if "steps" in attack.settings()}

    usual = steps(make_attacks())
    assert steps(make_attacks(budget=4)) == {name: 4 * count for name, count in usual.items()}
    assert len(set(usual.values())) > 1
    others: list[Any] = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    assert check_budget([Relearning(), *others], 4.0) == ["budget=4 has no effect on a, b, without steps."]
    assert check_budget([Relearning()], 4.0) == check_budget(others, None) == []
    with pytest.raises(ValueError, match="budget=4 has no effect on a, b, without steps: leave it out"):
        check_budget(others, 4.0)
    (short,) = make_attacks(["relearning"], budget=1e-3, settings={"relearning": {"threshold": "0.9"}})
    assert short == Relearning(steps=1, threshold=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["prompt_serch"]}, r"attacks='prompt_serch' is no attack \(closest: prompt_search\)"),
        (
            {"names": ["zzz"]},
            r"attacks='zzz' is no attack \(attacks: completion, concept_inversion, image_to_image",
        ),
        ({"names": ["relearning"], "allow_names": True}, "allow_names has no effect on relearning: no words are"),
        ({"names": ["relearning"] * 2}, "attacks=relearning relearning names one twice"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"budget": 0.0}, "budget=0 must be a positive number"),
        ({"budget": float("nan")}, "budget=nan must be a positive number"),
        ({"budget": 4.0, "steps": 7}, "budget=4 multiplies the default steps, and steps=7 sets them: give one"),
        (
            {"budget": 4.0, "settings": {"relearning": {"steps": "7"}}},
            r"budget=4 multiplies the default steps, and relearning\.steps=7 sets them: give one",
        ),
        (
            {"names": ["completion", "inversion"], "steps": 3},
            "steps=3 has no effect on completion, inversion: nothing",
        ),
    ],
)
def test_bad_names_and_steps(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_attacks(**arguments)


MINE = """
from dataclasses import dataclass
from typing import ClassVar

from lit_unlearn.attacks.base import Attack, Found
from lit_unlearn.attacks.relearning import Relearning


@dataclass(frozen=True, kw_only=True)
class Prefix(Attack):
    name: ClassVar[str] = "prefix"
    steps: int = 100
    words: str = "not"
    shares: tuple[float, float] = (0.0, 1.0)

    def search(self, model):
        return Found(self.words, model.draw)


class Namesake(Relearning):
    pass


class Slashed(Prefix):
    name = "../prefix"


class Nameless(Attack):
    def search(self, model):
        return Found("", model.draw)


class Unfinished(Attack):
    name = "unfinished"


class Other:
    name = "other"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``my_attacks`` of somebody else's."""
    (tmp_path / "my_attacks.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_attacks", raising=False)


def test_somebody_s_own_attack_needs_no_change_of_ours(mine: None) -> None:
    settings = {"prefix": {"words": "never", "shares": "[0.5, 1]", "steps": "4"}, "relearning": {"threshold": 0.25}}
    own, relearning = make_attacks(["my_attacks.Prefix", "relearning"], steps=7, settings=settings)
    assert own.settings() == {"steps": 4, "words": "never", "shares": (0.5, 1.0)}
    assert relearning == Relearning(steps=7, threshold=0.25)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("my_attacks.Perfix", {}, r"attacks='my_attacks.Perfix': my_attacks has no class Perfix \(closest: Prefix\)"),
        ("none_such.Attack", {}, "attacks='none_such.Attack' cannot be imported: there is no none_such; install it"),
        ("my_attacks.Other", {}, "attacks='my_attacks.Other' is no attack: it needs to be a subclass of Attack"),
        ("my_attacks.Unfinished", {}, "attacks='my_attacks.Unfinished' is no attack: .* that has a search"),
        ("my_attacks.Namesake", {}, "attacks='my_attacks.Namesake' is called relearning, as one of ours is"),
        ("my_attacks.Nameless", {}, "attacks='my_attacks.Nameless' declares no name"),
        ("my_attacks.Slashed", {}, "attacks='my_attacks.Slashed' declares no name"),
        (
            "my_attacks.Prefix",
            {"prefix": {"word": "x"}},
            "prefix.word is unknown to prefix: it has steps, words, shares",
        ),
        ("my_attacks.Prefix", {"prefix": {"shares": "1"}}, "prefix.shares: .*tuple.* expected, got 1"),
        ("my_attacks.Prefix", {"prefix": {"steps": "0"}}, "prefix.steps=0 must be at least 1"),
        (
            "my_attacks.Prefix",
            {"perfix": {"steps": 1}},
            r"perfix.steps is given, and perfix is not .* \(closest: prefix\)",
        ),
    ],
)
def test_own_attacks_and_settings_that_cannot_be_had(
    name: str, settings: dict[str, Any], message: str, mine: None
) -> None:
    with pytest.raises(ValueError, match=message):
        make_attacks([name], settings=settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prompt_search", {"num_tokens": 0}, r"prompt_search\.num_tokens=0 must be at least 1"),
        ("prompt_search", {"window": (0.9, 0.3)}, r"prompt_search\.window=\(0\.9, 0\.3\) must be two shares"),
        ("ring_a_bell", {"strength": float("nan")}, r"ring_a_bell\.strength=nan must be a positive number"),
        ("concept_inversion", {"learning_rate": 0.0}, r"concept_inversion\.learning_rate=0\.0 must be a positive"),
        ("concept_inversion", {"learning_rate": float("nan")}, r"concept_inversion\.learning_rate=nan must be a posit"),
        ("relearning", {"learning_rate": 0.0}, r"relearning\.learning_rate=0\.0 must be a positive number"),
        ("relearning", {"rank": 0}, r"relearning\.rank=0 must be at least 1"),
        ("relearning", {"pictures": "dogs"}, r"relearning\.pictures='dogs' must be concept or others"),
        ("relearning", {"parts": "none"}, r"relearning\.parts='none' must be edited or all"),
        ("relearning", {"threshold": 1.5}, r"relearning\.threshold=1\.5 must be larger than 0 and at most 1"),
        ("completion", {"share": 1.0}, r"completion\.share=1\.0 must be larger than 0 and less than 1"),
        ("completion", {"share": 0.01}, r"completion\.share=0\.01 of sampler_steps=20 leaves one model without a step"),
        ("completion", {"share": 0.9, "sampler_steps": 2}, r"share=0\.9 of sampler_steps=2 leaves one model without"),
        ("image_to_image", {"strength": 1.2}, r"image_to_image\.strength=1\.2 must be at most 1"),
        ("image_to_image", {"strength": 0.0}, r"image_to_image\.strength=0\.0 must be a positive number"),
        ("inpainting", {"masked": 1.0}, r"inpainting\.masked=1\.0 must be larger than 0 and less than 1"),
        ("inpainting", {"strength": 1.2}, r"inpainting\.strength=1\.2 must be at most 1"),
        ("noise_probe", {"scales": ()}, r"noise_probe\.scales=\(\) must be positive numbers, at least one"),
        ("noise_probe", {"scales": (1.0, -1.0)}, r"noise_probe\.scales=\(1\.0, -1\.0\) must be positive numbers"),
        ("noise_probe", {"scales": (1.0, 1.0)}, r"scales=\(1\.0, 1\.0\) has one twice: give --noise_probe\.tries"),
        ("noise_probe", {"tries": 0}, r"noise_probe\.tries=0 must be at least 1"),
        ("inversion", {"null_text_steps": -1}, r"inversion\.null_text_steps=-1 must be at least 0"),
        ("inversion", {"iterations": 0}, r"inversion\.iterations=0 must be at least 1"),
        ("inversion", {"learning_rate": 0.1}, r"inversion\.learning_rate=0\.1 has no effect without an optimisation"),
        ("prompt_levels", {"prefix": "a picture"}, r"prompt_levels\.prefix='a picture' must have {} once"),
        ("prompt_levels", {"prefix": "{} or {0}"}, r"prompt_levels\.prefix='\{\} or \{0\}' must have \{\} once"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_attack(name)(**settings)
