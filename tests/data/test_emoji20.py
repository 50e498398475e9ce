"""The concept set of the embedded model: only what that model knows, spread evenly, each prompt used once."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml

from lit_unlearn.data.concepts import ConceptSet, available_concept_sets, load_concept_set

REPOSITORY = Path(__file__).parents[2]
PHRASES = yaml.safe_load((REPOSITORY / "lit_unlearn/emoji/phrases.yaml").read_text(encoding="utf-8"))
FRAMES = ("this is", "we see", "here is", "look at", "there is", "a picture of", "an image of", "a nice picture of", "")
MAX_WORDS = 28
"""What fits the embedded model's context."""


@pytest.fixture(scope="module")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


Phrase = tuple[str, str, str, int]
"""Attribute, value, "direct" or "indirect", index."""


def longest_phrase(text: str, attributes: tuple[str, ...], without_article: bool = False) -> tuple[int, Phrase]:
    """Return length and meaning of the longest phrase of emoji-sd that ``text`` begins with."""
    matches = []
    for attribute in attributes:
        for value, entry in PHRASES[attribute].items():
            for form in ("direct", "indirect"):
                for index, phrase in enumerate(entry[form]):
                    words = phrase.split(" ", 1)[1] if without_article else phrase
                    if f"{text} ".startswith(f"{words} "):
                        matches.append((len(words), (attribute, value, form, index)))
    assert matches, f"no phrase of emoji-sd begins {text!r}"
    return max(matches)


def split_prompt(prompt: str) -> list[Phrase]:
    """Return the phrases of a prompt, which is built like the captions of emoji-sd: frame, subject, endings."""
    frame = next(frame for frame in FRAMES if prompt.startswith(frame))
    text = prompt[len(frame) :].strip()
    found: list[Phrase] = []
    adjectives = [(word, value) for value, entry in PHRASES["style"].items() for word in entry["adjective"]]
    for adjective, value in sorted(adjectives, reverse=True):  # "glossy 3d" before "glossy"
        article = "an" if adjective[0] in "aeiou" else "a"
        for start in (f"{article} {adjective} ", f"the {adjective} "):
            if text.startswith(start):
                found.append(("style", value, "direct", -1))
                text = text.removeprefix(start)
    length, subject = longest_phrase(text, ("subject",), without_article=bool(found))
    found.append(subject)
    while text := text[length:].strip():
        length, ending = longest_phrase(text, ("style", "scene"))
        found.append(ending)
    assert len({attribute for attribute, *_ in found}) == len(found), f"{prompt!r} says something twice"
    return found


def test_emoji20_has_the_twenty_concepts_of_the_embedded_model(emoji20: ConceptSet) -> None:
    assert "emoji20" in available_concept_sets()
    kinds = [concept.kind for concept in emoji20.concepts.values()]
    assert Counter(kinds) == {
        "object": 8,
        "action": 4,
        "style": 4,
        "scene": 4,
    }
    for concept in emoji20.concepts.values():
        assert (len(concept.direct), len(concept.indirect)) == (5, 5)
        assert (len(concept.edit_prompts), len(concept.target_prompts), len(concept.adversarial)) == (15, 15, 5)
        assert 2 <= len(concept.adjacent) <= 3
        assert concept.prompts == concept.direct + concept.indirect
        assert [other.name for other in emoji20.concepts.values() if other.find_name(concept.question)] == [
            concept.name
        ]


def test_emoji20_keeps_evaluation_apart_from_editing(emoji20: ConceptSet) -> None:
    evaluation = set(chain.from_iterable(concept.prompts for concept in emoji20.concepts.values()))
    for concept in emoji20.concepts.values():
        assert evaluation.isdisjoint(concept.edit_prompts)
        assert evaluation.isdisjoint(concept.target_prompts)


def test_emoji20_uses_only_words_that_the_model_knows(emoji20: ConceptSet) -> None:
    entries = chain.from_iterable(PHRASES[attribute].values() for attribute in ("subject", "style", "scene"))
    phrases = chain.from_iterable(chain.from_iterable(entry.values()) for entry in entries)
    known = set(" ".join([*phrases, *FRAMES]).split()) | {"a", "an", "the"}
    for concept in emoji20.concepts.values():
        prompts = (concept.anchor, *concept.prompts, *concept.edit_prompts, *concept.target_prompts)
        for prompt in prompts:
            assert set(prompt.split()) <= known, prompt
        assert max(len(prompt.split()) for prompt in (*prompts, *concept.adversarial)) <= MAX_WORDS


def test_emoji20_prompts_show_their_concept_by_the_phrases_set_aside_for_them(emoji20: ConceptSet) -> None:
    for concept in emoji20.concepts.values():
        attribute = concept.kind if concept.kind in ("style", "scene") else "subject"

        def phrase(prompt: str, attribute: str = attribute) -> Phrase:
            return next(item for item in split_prompt(prompt) if item[0] == attribute)

        assert {phrase(prompt)[1:3] for prompt in concept.direct} == {(concept.name, "direct")}
        # The five indirect evaluation phrases are the first five, in order; editing sees the last four only.
        assert [phrase(prompt)[1:] for prompt in concept.indirect] == [(concept.name, "indirect", i) for i in range(5)]
        edits = [phrase(prompt) for prompt in concept.edit_prompts]
        assert {value for _, value, *_ in edits} == {concept.name}
        assert [form for _, _, form, _ in edits].count("direct") == 8
        assert {index for _, _, form, index in edits if form == "indirect"} == {5, 6, 7, 8}


def test_emoji20_pairs_differ_only_in_the_concept(emoji20: ConceptSet) -> None:
    for concept in emoji20.concepts.values():
        for prompt, target_prompt in zip(concept.edit_prompts, concept.target_prompts, strict=True):
            pairs = list(zip(split_prompt(prompt), split_prompt(target_prompt), strict=True))
            changed = [(edit, target) for edit, target in pairs if edit != target]
            assert [(edit[1], target[1]) for edit, target in changed] == [(concept.name, concept.target)], prompt
            assert changed[0][0][2:] == changed[0][1][2:], prompt


def test_emoji20_spreads_subjects_styles_and_scenes(emoji20: ConceptSet) -> None:
    for field in ("prompts", "edit_prompts"):
        shown = [
            item[1]
            for concept in emoji20.concepts.values()
            for prompt in getattr(concept, field)
            for item in split_prompt(prompt)
            if item[1] != concept.name
        ]
        for value in (*PHRASES["subject"], *PHRASES["style"], "sunset", "rain", "aurora", "neon"):
            assert shown.count(value) >= 5, f"{value} in {field}"
