"""The hundred concepts: what the validator cannot know, since it holds for this set only."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import pytest

from lit_unlearn.data.concepts import Concept, load_concept_set
from lit_unlearn.data.names import name_key
from lit_unlearn.data.pairs import repaired, said_of

HUNDRED = load_concept_set("hundred")
CONCEPTS = list(HUNDRED.concepts.values())
KINDS = ["an everyday object", "an animal", "a plant", "a picture"]
"""Anchors, which tell the four kinds from each other: objects, animals, plants and styles."""


def texts(concept: Concept) -> tuple[str, ...]:
    """Everything that a fit or a judge reads of a concept, except its names."""
    prompts = *concept.prompts, *concept.edit_prompts, *concept.target_prompts
    return *prompts, concept.target, concept.anchor, concept.question


def test_there_are_twenty_five_concepts_of_each_of_four_kinds() -> None:
    assert [concept.anchor for concept in CONCEPTS] == [anchor for anchor in KINDS for _ in range(25)]
    assert Counter((concept.anchor, concept.kind) for concept in CONCEPTS) == {
        **{(anchor, "object"): 25 for anchor in KINDS[:3]},
        (KINDS[3], "style"): 25,
    }
    assert len(HUNDRED.retain) == len(set(HUNDRED.retain)) == 200


def test_a_name_belongs_to_one_concept_and_no_text_names_another() -> None:
    names = [name_key(name) for concept in CONCEPTS for name in concept.names]
    assert len(names) == len(set(names)) == 122
    for concept in CONCEPTS:
        others = [other for other in CONCEPTS if other is not concept]
        assert not [(t, o.name) for t in (*texts(concept), *concept.names) for o in others if o.find_name(t)]


def test_targets_are_outside_of_the_set_and_all_different() -> None:
    targets = [concept.target for concept in CONCEPTS]
    assert len(set(targets)) == 100
    assert not [t for t in targets if any(concept.find_name(t) for concept in CONCEPTS)]
    for concept in CONCEPTS:
        assert all(concept.target in prompt for prompt in concept.target_prompts)
        assert all(concept.find_name(prompt) for prompt in concept.edit_prompts)
        assert not any(concept.target in prompt for prompt in (*concept.prompts, *concept.edit_prompts))


def test_all_of_them_can_be_edited_at_once_as_they_are(recwarn: pytest.WarningsRecorder) -> None:
    made = repaired(CONCEPTS, HUNDRED)
    assert made == CONCEPTS and said_of(CONCEPTS, made) == ""
    assert HUNDRED.retain_prompts(list(HUNDRED.concepts)) == list(HUNDRED.retain)
    assert not recwarn.list


def test_every_target_is_retained() -> None:
    assert not [c.target for c in CONCEPTS if not any(c.target in text for text in HUNDRED.retain)]


def test_no_other_concept_is_lost_when_one_is_edited() -> None:
    for concept in CONCEPTS:
        retained = HUNDRED.retain_prompts([concept.name])
        assert len(retained) == 99 * 3 + 200
        assert set(retained).isdisjoint(concept.edit_prompts)


def test_articles_and_questions_are_english() -> None:
    for text in chain.from_iterable(map(texts, CONCEPTS)):
        words = text.casefold().split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), text
        assert text == " ".join(text.split()) and text.isascii()
    assert all(concept.find_name(concept.question) and concept.question.endswith("?") for concept in CONCEPTS)
