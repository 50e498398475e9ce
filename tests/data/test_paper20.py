"""The paper's concepts: what the validator cannot know, since it holds for this set only."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import pytest

from lit_unlearn.data.concepts import Concept, load_concept_set
from lit_unlearn.reports.paper import load_paper_tables

PAPER20 = load_concept_set("paper20")
CONCEPTS = [pytest.param(concept, id=concept.name) for concept in PAPER20.concepts.values()]
NUM_NAMED = 10
"""Edit prompts of a concept that name it; the others describe it."""

MAX_WORDS = 40
"""Fewer than 60 tokens of CLIP, which takes 77."""

SLIPS = re.compile(r"\b[Aa] [aeio]|\b[Aa]n (?!hour)[^aeiouAEIOU]|\b(\w+) \1\b")
"""The wrong article, and a word that is there twice."""

# Targets of the authors' pairs, and a pattern of the words that name them in a prompt.
TARGETS = {
    "AppleFruit": ("orange", "oranges?"),
    "AuroraBorialis": ("afternoon", "afternoon"),
    "BarbetonDaisy": ("hibiscus", "hibiscus"),
    "BlueJay": ("parrot", "parrots?"),
    "Dancing": ("sitting", "sitting"),
    "Doodle": ("realistic", "realistic"),
    "Eating": ("walking", "walking"),
    "GolfBall": ("tennis ball", "tennis balls?"),
    "Jumping": ("sitting", "sitting"),
    "LabradorRetriever": ("cat", "cat|kittens"),
    "Monet": ("Van Gogh", "van gogh"),
    "Neon": ("countryside", "countryside"),
    "Rainfall": ("sunny", "sunny|sunshine|sunbeams"),
    "Scenery": ("interior", "interior"),
    "Sketch": ("realistic", "realistic"),
    "Sleeping": ("sitting", "sitting"),
    "Sunset": ("afternoon", "afternoon"),
    "VanGogh": ("Monet", "monet"),
    "Walking": ("sitting", "sitting"),
    "Wedding": ("family reunion", "family reunion"),
}

# Beginnings of words that would give the concept away, beyond its names as whole words.
GIVEAWAYS = {
    "AppleFruit": "apple",
    "AuroraBorialis": "aurora|northern light|polar light",
    "BarbetonDaisy": "dais|gerber|barber?ton|transvaal",
    "BlueJay": "jay|bluejay",
    "Dancing": "danc",
    "Doodle": "doodl",
    "Eating": "eat|ate",
    "GolfBall": "golf",
    "Jumping": "jump|leap",
    "LabradorRetriever": "labrador|retriever|retrieving|lab",
    "Monet": "monet|claude",
    "Neon": "neon",
    "Rainfall": "rain|downpour|shower|drizzl",
    "Scenery": "scen|landscape",
    "Sketch": "sketch",
    "Sleeping": "sleep|slept|asleep|nap|doz|slumber",
    "Sunset": "sunset|sundown|setting sun|dusk",
    "VanGogh": "van gogh|vincent|gogh",
    "Walking": "walk|stroll",
    "Wedding": "wed",
}


def named(concept: Concept) -> list[bool]:
    return [concept.find_name(prompt) is not None for prompt in concept.edit_prompts]


def split_pair(prompt: str, target_prompt: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return the words that a pair shares at its beginning, those that differ (two lists), and its shared end."""
    edit, target = prompt.split(), target_prompt.split()
    shortest = min(len(edit), len(target))
    prefix = next((i for i in range(shortest) if edit[i] != target[i]), shortest)
    suffix = next((i for i in range(shortest - prefix) if edit[-1 - i] != target[-1 - i]), shortest - prefix)
    end = len(edit) - suffix
    return edit[:prefix], edit[prefix:end], target[prefix : len(target) - suffix], edit[end:]


def test_concepts_are_those_of_the_papers_tables_five_of_each_kind() -> None:
    table = [concept for concept in load_paper_tables()["null_space"] if concept != "Average"]
    assert list(PAPER20.concepts) == table
    kinds = [concept.kind for concept in PAPER20.concepts.values()]
    assert Counter(kinds) == {
        "object": 5,
        "action": 5,
        "style": 5,
        "scene": 5,
    }


@pytest.mark.parametrize("concept", CONCEPTS)
def test_counts_are_those_of_the_protocol(concept: Concept) -> None:
    assert (len(concept.direct), len(concept.indirect), len(concept.adversarial)) == (5, 5, 1)
    assert (len(concept.edit_prompts), len(concept.target_prompts)) == (15, 15)
    assert 1 <= len(concept.adjacent) <= 3


def test_targets_are_those_of_the_authors() -> None:
    assert {concept.name: concept.target for concept in PAPER20.concepts.values()} == {
        name: target for name, (target, _) in TARGETS.items()
    }


@pytest.mark.parametrize("concept", CONCEPTS)
def test_what_people_and_models_read_is_plain_english(concept: Concept) -> None:
    prompts = (*concept.prompts, *concept.edit_prompts, *concept.target_prompts)
    read = (*concept.names, concept.target, concept.anchor, concept.question, *concept.adversarial, *prompts)
    for text in read:
        assert not re.search(r"[a-z][A-Z]", text), text  # no CamelCase
        assert text.isascii() and text == " ".join(text.split()), text
        assert len(text.split()) <= MAX_WORDS, text
    for prompt in prompts:
        assert prompt[0].isupper() or prompt[0].isdigit(), prompt
        assert not prompt.endswith((".", ",")), prompt
        assert not SLIPS.search(prompt), prompt


@pytest.mark.parametrize("concept", CONCEPTS)
def test_question_asks_for_the_concept_in_its_kind(concept: Concept) -> None:
    assert concept.find_name(concept.question)
    beginning = {
        "object": r"Is there an? .* in this picture\?",
        "action": r"Is someone \w+ in this picture\?",
        "style": r"Is this picture (drawn )?in .*style.*\?",
        "scene": r"(Does this picture show .*|Is it raining in this picture)\?",
    }[concept.kind]
    assert re.fullmatch(beginning, concept.question)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_descriptions_do_not_give_the_name_away(concept: Concept) -> None:
    pattern = re.compile(rf"\b(?:{GIVEAWAYS[concept.name]})", re.IGNORECASE)
    assert all(pattern.search(prompt) for prompt in concept.direct)  # the pattern finds what it is for
    described = [prompt for prompt, is_named in zip(concept.edit_prompts, named(concept), strict=True) if not is_named]
    for prompt in (*concept.indirect, *described):
        assert not concept.find_name(prompt) and not pattern.search(prompt), prompt


@pytest.mark.parametrize("concept", CONCEPTS)
def test_ten_edit_prompts_name_the_concept_and_their_targets_name_the_target(concept: Concept) -> None:
    assert named(concept) == [True] * NUM_NAMED + [False] * 5
    target = re.compile(rf"\b(?:{TARGETS[concept.name][1]})", re.IGNORECASE)
    assert not any(target.search(prompt) for prompt in concept.edit_prompts)
    for prompt, target_prompt in zip(concept.edit_prompts[:NUM_NAMED], concept.target_prompts, strict=False):
        _, removed, added, after = split_pair(prompt, target_prompt)
        # A golf ball and a tennis ball share their last word.
        assert concept.find_name(" ".join(removed + after[:1])), prompt
        assert target.search(" ".join(added + after[:1])), target_prompt


@pytest.mark.parametrize("concept", CONCEPTS)
def test_pairs_differ_in_one_phrase_only(concept: Concept) -> None:
    for prompt, target_prompt in zip(concept.edit_prompts, concept.target_prompts, strict=True):
        before, removed, added, after = split_pair(prompt, target_prompt)
        assert removed and added, prompt
        # A name is replaced by a phrase of a few words, a description by a longer one; the rest stays.
        assert max(len(removed), len(added)) <= (8 if concept.find_name(prompt) else 15), prompt
        assert len(before) + len(after) >= 2, prompt
        assert not concept.find_name(" ".join(before)) and not concept.find_name(" ".join(after)), prompt


def test_no_prompt_is_used_twice_and_none_is_both_edited_with_and_judged_by() -> None:
    concepts = PAPER20.concepts.values()
    evaluation = [p.casefold() for c in concepts for p in (*c.prompts, *c.adversarial)]
    edits = [p.casefold() for c in concepts for p in c.edit_prompts]
    targets = [p.casefold() for c in concepts for p in c.target_prompts]
    assert (len(evaluation), len(edits), len(targets)) == (220, 300, 300)
    assert len(set(chain(evaluation, edits, targets))) == 820


@pytest.mark.parametrize("concept", CONCEPTS)
def test_edit_prompts_do_not_describe_the_concept_in_the_words_it_is_judged_by(concept: Concept) -> None:
    def phrases(prompt: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w'-]+", prompt.casefold())
        return set(zip(words, words[1:], words[2:], words[3:], strict=False))

    judged = set().union(*map(phrases, concept.indirect))
    assert judged
    assert judged.isdisjoint(set().union(*map(phrases, concept.edit_prompts)))


@pytest.mark.parametrize("concept", CONCEPTS)
def test_adversarial_prompt_is_gibberish_without_the_name(concept: Concept) -> None:
    (prompt,) = concept.adversarial
    assert not any(other.find_name(prompt) for other in PAPER20.concepts.values())
    english = set(
        chain.from_iterable(
            re.findall(r"\w+", text.casefold())
            for other in PAPER20.concepts.values()
            for text in (*other.prompts, *other.edit_prompts, *other.target_prompts, *other.names)
        )
    )
    words = prompt.split()
    assert sum(word not in english for word in words) > len(words) / 2


def test_other_concepts_are_retained_unless_they_name_the_edited_one() -> None:
    for concept in PAPER20.concepts.values():
        retained = PAPER20.retain_prompts([concept.name])
        # Prompts were written so that none shows a second concept by its name.
        assert len(retained) == 285
        assert set(retained).isdisjoint(concept.edit_prompts)


def test_prompts_are_varied() -> None:
    prompts = [p for c in PAPER20.concepts.values() for p in (*c.prompts, *c.edit_prompts)]
    beginnings = [" ".join(prompt.split()[:2]).casefold() for prompt in prompts]
    assert max(beginnings.count(beginning) for beginning in set(beginnings)) <= len(prompts) / 50
    assert len(set(beginnings)) > len(prompts) / 2
