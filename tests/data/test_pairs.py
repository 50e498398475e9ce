"""Pairs of several concepts: what is left out, where targets lead, and how target prompts are reworded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lit_unlearn.data.concepts import Concept, ConceptSet, load_concept_set
from lit_unlearn.data.pairs import FEW_PAIRS, edited_into, repaired, resolved_target, said_of, split

TEN = ("dog", "castle", "apple", "owl", "sketch", "cartoon", "rain", "sunset", "walking", "surfing")
EMOJI = load_concept_set("emoji20")


def made(*names: str, concepts: ConceptSet = EMOJI) -> dict[str, Concept]:
    edited = [concepts.get(name) for name in names]
    return {concept.name: concept for concept in repaired(edited, concepts)}


def pairs(concept: Concept) -> dict[str, str]:
    return dict(zip(concept.edit_prompts, concept.target_prompts, strict=True))


def test_a_single_concept_is_as_the_set_has_it() -> None:
    assert made("surfing") == {"surfing": EMOJI.get("surfing")}


@pytest.mark.parametrize(("names", "left"), [(TEN, 108), (tuple(EMOJI.concepts), 144 + 27)])
def test_pairs_that_name_another_edited_concept_are_left_out(names: tuple[str, ...], left: int) -> None:
    assert sum(len(concept.edit_prompts) for concept in made(*names).values()) == left


@pytest.mark.parametrize("name", ["emoji20", "hundred", "paper20"])
def test_no_pair_keeps_or_brings_back_an_edited_concept(name: str) -> None:
    concepts, draw = load_concept_set(name), random.Random(0)
    for _ in range(60):
        edited = [concepts.get(n) for n in draw.sample(list(concepts.concepts), draw.randint(2, 20))]
        for own in repaired(edited, concepts):
            assert own.edit_prompts
            others = [other for other in edited if other.name != own.name]
            assert not [text for text in own.edit_prompts if any(other.find_name(text) for other in others)]
            assert not [into for into in own.target_prompts if any(other.find_name(into) for other in edited)]
            assert not any(other.find_name(text) for other in edited for text in (own.target, own.anchor))


def test_a_concept_with_few_pairs_left_gets_some_in_which_the_others_are_replaced() -> None:
    found = made(*EMOJI.concepts)
    assert {len(found[name].edit_prompts) for name in ("cartoon", "neon", "sketch", "pixel art", "rain")} == {FEW_PAIRS}
    cartoon, sketch = pairs(found["cartoon"]), pairs(found["sketch"])
    assert cartoon["there is a woman standing in cartoon style"] == "there is a woman standing"  # was dancing
    assert cartoon["a picture of a cartoon tulip"] == "a picture of a tulip"  # was a daisy
    assert sketch["a picture of an ink sketch man standing on a plain background"] == (
        "a picture of a man standing on a plain background"
    )
    said = said_of(list(EMOJI.concepts.values()), list(found.values()))
    assert said.startswith("156 of 300 pairs name another edited concept and are left out. ")
    assert "would keep fewer than 6: 27 come back with the targets of the other concepts that they name." in said


def test_a_chain_of_targets_is_followed_to_its_end() -> None:
    assert made("surfing", "dog")["surfing"].target == "walking"
    surfing = made("surfing", "walking")["surfing"]
    assert (surfing.target, surfing.anchor) == ("standing", "a man standing")
    assert pairs(surfing)["an image of a surfing man"] == "an image of a standing man"
    assert pairs(surfing)["this is the man on a board in the sea"] == "this is the man standing"  # described, not named
    assert pairs(surfing)["here is the guy who rides inside the barrel"] == "here is the guy standing"


def test_a_circle_leads_to_a_concept_of_the_same_kind_that_stays() -> None:
    rain = made("rain", "sunset")["rain"]
    assert (rain.target, rain.anchor) == ("aurora", "a picture in front of an aurora")
    assert pairs(rain)["here is a blocky pixel art lemon during a rain shower"] == (
        "here is a blocky pixel art lemon during an aurora"
    )
    assert pairs(rain)["an image of a soccer ball when a drizzle begins"] == (
        "an image of a soccer ball in front of an aurora"
    )


def test_a_circle_of_all_leads_to_what_another_of_its_kind_becomes() -> None:
    objects = [concept.name for concept in EMOJI.concepts.values() if concept.kind == "object"]
    found = made(*objects)
    assert found["dog"].target == found["cat"].target == found["owl"].target == "parrot"  # adjacent: cat and owl
    assert pairs(found["dog"])["a picture of a friendly dog"] == "a picture of a friendly parrot"
    assert pairs(found["apple"])["there is an apple"] == "there is a tulip"  # with the article that it needs


def test_styles_and_scenes_without_any_target_become_nothing() -> None:
    found = made(*(concept.name for concept in EMOJI.concepts.values() if concept.kind in ("style", "scene")))
    assert {concept.target for concept in found.values()} == {""}
    assert pairs(found["cartoon"])["there is a woman dancing in cartoon style"] == "there is a woman dancing"
    assert pairs(found["glossy"])["look at a glossy tulip flower"] == "look at a tulip flower"
    assert pairs(found["rain"])["we see a fresh tulip in the rain"] == "we see a fresh tulip"
    assert {concept.anchor for concept in found.values()} <= {"a picture", "a picture in light"}


def test_a_concept_without_a_pair_of_its_own_keeps_all_with_both_targets(recwarn: pytest.WarningsRecorder) -> None:
    dog, rain = EMOJI.get("dog"), EMOJI.get("rain")
    both = replace(dog, edit_prompts=("a dog in the rain",), target_prompts=("a cat in the rain",))
    found, _ = repaired([both, rain], ConceptSet("own", {"dog": both, "rain": rain}, EMOJI.path))
    assert pairs(found) == {"a dog in the rain": "a cat in the sunset"}
    assert "Every edit prompt of dog names another edited concept" in str(recwarn.pop(UserWarning).message)


def test_what_is_changed_is_said() -> None:
    edited = [EMOJI.get(name) for name in ("surfing", "walking", "rain")]
    said = said_of(edited, repaired(edited, EMOJI))
    assert said.endswith("Targets that are edited too are replaced: surfing → standing (not walking).")
    left = 45 - sum(len(concept.edit_prompts) for concept in repaired(edited, EMOJI))
    assert said.startswith(f"{left} of 45 pairs name another edited concept and are left out.")
    assert said_of(edited[:1], edited[:1]) == ""


def test_a_target_that_leads_nowhere_stays() -> None:
    dog = replace(EMOJI.get("dog"), target="cat", adjacent=())
    cat = replace(EMOJI.get("cat"), target="dog", adjacent=())
    alone = ConceptSet("own", {"dog": dog, "cat": cat}, EMOJI.path)
    assert resolved_target(dog, [dog, cat], alone).name == "cat"


@pytest.mark.parametrize(
    ("text", "other", "kind", "before", "words", "end"),
    [
        ("a dog at sunset", "a dog in the rain", "scene", "at", "sunset", ""),
        ("a cartoon dog in the rain", "a glossy dog in the rain", "style", "", "cartoon", "dog in the rain"),
        ("a dog drawn as a cartoon", "a dog drawn as a glossy render", "style", "drawn as a", "cartoon", ""),
        (
            "a dog in cartoon style at sunset",
            "a dog in glossy style at sunset",
            "style",
            "in",
            "cartoon style",
            "at sunset",
        ),
        ("there is an apple here", "there is a lemon here", "object", "an", "apple", "here"),
    ],
)
def test_a_phrase_has_its_articles_and_prepositions(
    text: str, other: str, kind: str, before: str, words: str, end: str
) -> None:
    start, phrase, rest = split(text, other, kind)
    assert (" ".join(phrase.before), " ".join(phrase.words), " ".join(rest)) == (before, words, end)
    assert " ".join((*start, *phrase.before, *phrase.words, *rest)) == text


@pytest.mark.parametrize("seed", range(5))
def test_one_after_the_other_nothing_is_left_as_what_goes_later(seed: int) -> None:
    emoji = load_concept_set("emoji20")
    order = list(emoji.concepts.values())
    random.Random(seed).shuffle(order)
    became: dict[str, str] = {}
    before: dict[str, str] = {}
    for number, new in enumerate(order):
        again = edited_into(order[:number], [new], emoji)
        for own in (new, *again):
            became[own.name] = resolved_target(own, order[: number + 1], emoji).name
        left = [c.name for c in order[:number] if c not in again and new.find_name(became[c.name])]
        assert left == []  # whoever became it is edited again
        assert all(new.find_name(before[c.name]) for c in again)
        before = dict(became)


def test_a_dog_that_became_a_cat_goes_with_the_cats() -> None:
    emoji = load_concept_set("emoji20")
    dog, owl, cat, lemon = (emoji.get(name) for name in ("dog", "owl", "cat", "lemon"))
    assert edited_into([dog, owl], [cat], emoji) == [dog]
    assert edited_into([dog, owl], [lemon], emoji) == []
    assert edited_into([dog, cat], [owl], emoji) == [dog, cat]  # both became an owl, since they are a circle
    assert edited_into([dog, cat], [lemon], emoji) == []
