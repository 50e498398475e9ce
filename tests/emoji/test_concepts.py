"""Concept sets for the embedded models, made of a name."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.emoji.captions import vocabulary
from lit_unlearn.emoji.concepts import emoji_set, known_concepts

PATH = Path("made.yaml")
PAIRS = [
    (name, target)
    for name, target in itertools.permutations(known_concepts(), 2)
    if known_concepts()[name] == known_concepts()[target] and "plain" not in (name, target)
]


def test_every_pair_makes_a_valid_set_of_words_that_the_model_knows() -> None:
    words = set(vocabulary())
    for name, target in PAIRS:
        concepts, own = emoji_set(name, target, PATH)
        concept = concepts.concepts[own]
        assert (len(concept.edit_prompts), concept.target) == (15, target)
        used = {word for text in (*concept.edit_prompts, *concept.target_prompts) for word in text.split()}
        assert used <= words, (name, target, used - words)


def test_concept_of_the_set_with_its_own_target_stays_as_it_is() -> None:
    shipped = load_concept_set("emoji20")
    for name in shipped.concepts:
        concepts, _ = emoji_set(name, None, PATH)
        assert concepts.concepts == shipped.concepts


def test_concept_that_the_set_lacks_is_added_with_the_judges_question() -> None:
    concepts, own = emoji_set("a parrot", "owl", PATH, ["tulip"], questions={"parrot": "Does this show a parrot?"})
    assert own == "parrot"
    assert {*concepts.concepts} - {*load_concept_set("emoji20").concepts} == {"parrot", "tulip"}
    assert concepts.concepts["parrot"].question == "Does this show a parrot?"
    assert concepts.concepts["parrot"].adjacent == ("tulip",)


def test_style_gets_the_phrases_of_another_target() -> None:
    concept = emoji_set("sketch", "cartoon", PATH)[0].concepts["sketch"]
    pairs = dict(zip(concept.edit_prompts, concept.target_prompts, strict=True))
    assert pairs["we see an ink sketch soccer ball"] == "we see a flat cartoon soccer ball"
    assert pairs["a fresh daisy in the look of a woodcut"] == "a fresh daisy in the look of disney"


@pytest.mark.parametrize(
    ("name", "target", "protect", "message"),
    [
        ("unicorn", "cat", [], "concept='unicorn': the embedded model does not draw it, so there is nothing to erase"),
        ("dog", "unicorn", [], "to='unicorn': the embedded model does not draw it"),
        ("dog", "dog", [], "to='dog' is the concept itself"),
        ("dog", "rain", [], "to='rain' is a scene, but dog is a subject"),
        ("dog", "cat", ["Dog"], "protect='dog' is what is to be erased"),
        ("parrot", None, [], "has no target of its own"),
        ("plain", "rain", [], "concept='plain' is what pictures have without"),
    ],
)
def test_what_the_model_does_not_draw_is_refused(
    name: str, target: str | None, protect: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        emoji_set(name, target, PATH, protect)
