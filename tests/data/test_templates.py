"""Concept sets that are made of a name: what holds of every sentence, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.data.names import bare, find_names, read
from lit_unlearn.data.templates import DIRECT, EDIT, Wish, phrase_of, set_of, split_names, templates, written

NAMES = ("Mickey Mouse", "owl", "a table", "Dalí", "l'été", "O'Brien", "ミッキーマウス", "собака", "كلب", "미키 마우스")
PATH = Path("made.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_of_a_kind_are_disjoint_and_have_one_place_for_the_phrase(kind: str) -> None:
    own = templates()["kinds"][kind]
    sentences = [*own["edit"], *own["direct"]]
    assert len({read(sentence).letters for sentence in sentences}) == len(sentences)
    assert all(sentence.count("{}") == 1 for sentence in sentences)
    assert len(own["edit"]) >= EDIT + 3
    assert len(own["direct"]) >= DIRECT + 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_set_is_valid_and_names_the_concept_where_it_should(name: str, kind: str) -> None:
    made = set_of([Wish(name, "a lamp", kind)], PATH, protect=["Minnie Mouse"])
    concept = made.get(bare(name))
    assert all(concept.find_name(prompt) for prompt in (*concept.direct, *concept.edit_prompts))
    assert not any(concept.find_name(prompt) for prompt in concept.target_prompts)
    assert all("a lamp" in prompt for prompt in concept.target_prompts)
    assert concept.adjacent == ("Minnie Mouse",)
    assert not {*concept.direct} & {*concept.edit_prompts, *made.retain_prompts([concept.name])}
    assert not any(concept.find_name(prompt) for prompt in made.retain_prompts([concept.name]))


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("dog", "a dog"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("école", "an école"),
        ("dogs", "dogs"),
        ("bus", "a bus"),
        ("the moon", "the moon"),
        ("two cats", "two cats"),
        ("Eiffel Tower", "Eiffel Tower"),
        ("собака", "собака"),
        ("犬", "犬"),
    ],
)
def test_article_of_an_object(name: str, phrase: str) -> None:
    assert phrase_of(name, "object") == phrase
    assert phrase_of(name, "person") == name


def test_sentences_that_name_the_concept_are_replaced_by_spare_ones() -> None:
    made = written(Wish("photo", "drawing"))
    assert sum(len(find_names(prompt, ["photo"])) for prompt in made["edit_prompts"]) == EDIT
    assert len(made["edit_prompts"]) == EDIT


def test_concept_that_is_among_the_general_ones_is_not_retained() -> None:
    made = set_of([Wish("horse", "cow")], PATH)
    assert list(made.concepts).count("horse") == 1
    assert not any(made.get("horse").find_name(prompt) for prompt in made.retain_prompts(["horse"]))
    forest = set_of([Wish("forest", "a desert", "scene")], PATH)
    assert [name for name in forest.concepts if "forest" in name] == ["forest"]


def test_retained_prompts_are_those_of_others_the_general_ones_and_the_users() -> None:
    made = set_of([Wish("Mickey Mouse", "a cartoon mouse", "character")], PATH, retain=["my own garden"])
    kept = made.retain_prompts(["Mickey Mouse"])
    assert {"my own garden", templates()["retain"][0], made.get("car").edit_prompts[0]} <= {*kept}
    assert made.retain[0] == "my own garden"


def test_concepts_that_the_judge_does_not_know_are_retained_unjudged() -> None:
    made = set_of([Wish("dog", "cat")], PATH, judged={"Is there a car in this picture?"})
    assert [*made.concepts] == ["dog", "car"]
    assert "a photo of a horse" in made.retain


def test_set_is_the_same_when_it_is_written_and_read(tmp_path: Path) -> None:
    import yaml

    made = set_of([Wish("l'été", "l'hiver", "scene")], PATH)
    text = yaml.safe_dump(made.content(), sort_keys=False, allow_unicode=True)
    (tmp_path / "set.yaml").write_text(text, encoding="utf-8")
    found = load_concept_set(tmp_path / "set.yaml")
    assert found.sha256 == made.sha256
    assert found.retain == made.retain


@pytest.mark.parametrize(
    ("wish", "protect", "retain", "message"),
    [
        (Wish(" ", "cat"), [], [], "concept=' ' has nothing that can be read"),
        (Wish("dog", ""), [], [], "to='' has nothing that can be read"),
        (Wish("dog", "a Dog"), [], [], "to='a Dog' is the concept itself"),
        (Wish("dog", "a small dog"), [], [], "to='a small dog' names the concept 'dog'"),
        (Wish("dog", "cat", "animal"), [], [], "kind='animal' is not one of object, person"),
        (Wish("dog", "cat"), ["DOG"], [], "protect='DOG' names what is to be erased"),
        (Wish("dog", "cat"), ["-"], [], "protect='-' has nothing that can be read"),
        (Wish("dog", "cat"), [], ["a dog on a sofa"], "retain has 'a dog on a sofa', which names"),
        (Wish("a", "cat"), [], [], "is a word of most sentences"),
    ],
)
def test_bad_wishes_are_refused(wish: Wish, protect: list[str], retain: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_of([wish], PATH, protect=protect, retain=retain)


def test_neighbours_are_separated_by_commas_of_any_script() -> None:
    assert split_names(["Minnie Mouse, a mouse", "ネズミ、ねこ"]) == ["Minnie Mouse", "a mouse", "ネズミ", "ねこ"]
    with pytest.raises(ValueError, match="has an empty name"):
        split_names(["a,,b"])
