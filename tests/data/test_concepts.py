from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_unlearn.data import concepts
from lit_unlearn.data.concepts import KINDS, ConceptSet, available_concept_sets, load_concept_set

REPOSITORY = Path(__file__).parents[2]
PHRASES = yaml.safe_load((REPOSITORY / "lit_unlearn/emoji/phrases.yaml").read_text(encoding="utf-8"))
FRAMES = ("this is", "we see", "here is", "look at", "there is", "a picture of", "an image of", "a nice picture of", "")
MAX_WORDS = 28
"""What fits the embedded model's context."""

VALID: dict[str, Any] = {
    "name": "pets",
    "prompts_per_concept": {"direct": 2, "indirect": 1, "edit": 2},
    "concepts": {
        "guide dog": {
            "kind": "object",
            "names": ["guide dog", "dog"],
            "target": "cat",
            "anchor": "a pet",
            "question": "Is there a guide dog in this picture?",
            "direct": ["a guide dog", "one happy dog"],
            "indirect": ["a barking pet"],
            "edit_prompts": ["the guide dog", "an animal that fetches"],
            "target_prompts": ["the cat", "an animal that purrs"],
            "adjacent": ["cat"],
            "adversarial": ["gdo wuff"],
        },
        "cat": {
            "kind": "object",
            "target": "a parrot",
            "anchor": "a bird",
            "question": "Is there a cat in this picture?",
            "direct": ["a cat", "one happy cat"],
            "indirect": ["a purring pet"],
            "edit_prompts": ["this cat", "a Cat beside a Guide-Dog"],
            "target_prompts": ["this parrot", "a parrot beside a pet"],
        },
    },
}


@pytest.fixture(scope="module")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


def write(folder: Path, content: object) -> Path:
    path = folder / "pets.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


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
    assert {kind: kinds.count(kind) for kind in KINDS} == {"object": 8, "action": 4, "style": 4, "scene": 4}
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


def test_retain_prompts_are_the_edit_prompts_of_others_that_do_not_name_the_edited_concept(emoji20: ConceptSet) -> None:
    dropped = 0
    for edited in emoji20.concepts.values():
        others = [p for c in emoji20.concepts.values() if c is not edited for p in c.edit_prompts]
        retained = emoji20.retain_prompts([edited.name])
        assert retained == [prompt for prompt in others if not re.search(rf"\b{edited.name}\b", prompt)]
        assert set(retained).isdisjoint(edited.edit_prompts)
        dropped += len(others) - len(retained)
    assert dropped > 0
    both = emoji20.retain_prompts(["dog", "glossy"])
    assert set(both) == set(emoji20.retain_prompts("dog")) & set(emoji20.retain_prompts(["Glossy"]))
    with pytest.raises(ValueError, match=r"'dgo'.*closest names: dog"):
        emoji20.retain_prompts(["dgo"])


@pytest.mark.parametrize("name", ["soccer ball", "Soccer Ball", "soccer_ball", "SOCCER-BALL", "SoccerBall"])
def test_get_ignores_case_and_separators(emoji20: ConceptSet, name: str) -> None:
    assert emoji20.get(name) is emoji20.concepts["soccer ball"]


def test_get_offers_closest_names(emoji20: ConceptSet) -> None:
    with pytest.raises(ValueError, match="'emoji20' has no concept 'cartoons'; closest names: cartoon"):
        emoji20.get("cartoons")
    with pytest.raises(ValueError, match=r"its concepts are: apple, lemon, .*neon"):
        emoji20.get("zzzzzz")


def test_names_match_as_whole_words_only(tmp_path: Path) -> None:
    dog = load_concept_set(write(tmp_path, VALID)).get("guide dog")
    assert [dog.find_name(text) for text in ("a DOG.", "two guide_dogs", "dogma", "guide-dog!", "hotdog")] == [
        "DOG",
        None,
        None,
        "guide-dog",
        None,
    ]
    # The same words are the ones that something else takes the place of, wherever they stand.
    assert dog.replace_names("A Dog, a guide-dog and a hotdog", "{}") == "A {}, a {} and a hotdog"


def test_set_of_ones_own_may_declare_other_counts_and_leave_out_optional_fields(tmp_path: Path) -> None:
    pets = load_concept_set(write(tmp_path, VALID))
    assert (pets.name, pets.counts.edit, pets.path) == ("pets", 2, tmp_path / "pets.yaml")
    cat = pets.get("cat")
    assert (cat.names, cat.adjacent, cat.adversarial) == (("cat",), (), ())
    # "a Cat beside a Guide-Dog" names the edited concept, in another case and with a hyphen.
    assert pets.retain_prompts(["guide dog"]) == ["this cat"]
    assert pets.retain_prompts(["guide dog", "cat"]) == []
    assert pickle.loads(pickle.dumps(pets)) == pets


def pets_with(**fields: dict[str, Any]) -> dict[str, Any]:
    """The valid set with other fields of its concepts, or with further concepts."""
    content = copy.deepcopy(VALID)
    for name, changes in fields.items():
        entry = content["concepts"].setdefault(name, copy.deepcopy(VALID["concepts"]["cat"]))
        entry |= changes
    return content


SNACK = {
    "names": ["hot dog"],
    "target": "burger",
    "anchor": "a snack",
    "direct": ["a hot-dog", "the Hot Dog"],
    "indirect": ["a sausage in a bun"],
    "edit_prompts": ["one hot_dog", "a hot dog beside a dog"],
    "target_prompts": ["one burger", "a burger beside a pet"],
}


def test_a_name_within_a_longer_name_of_another_concept_does_not_count(tmp_path: Path) -> None:
    content = pets_with(**{"snack": SNACK})
    content["concepts"]["guide dog"]["edit_prompts"] = ["the guide dog", "an animal that fetches a hot dog"]
    content["concepts"]["guide dog"]["indirect"] = ["a pet that barks at a hot dog"]
    pets = load_concept_set(write(tmp_path, content))
    dog, snack = pets.get("guide dog"), pets.get("snack")
    assert [dog.find_name(text) for text in ("a hot dog", "a hot dog and a dog", "chili hot-dog's")] == [
        None,
        "dog",
        None,
    ]
    assert dog.replace_names("a hot dog and a dog", "cat") == "a hot dog and a cat"
    assert pets.retain_prompts(["guide dog"]) == ["this cat", "one hot_dog"]
    assert pets.retain_prompts(["snack"]) == ["the guide dog", "this cat", "a Cat beside a Guide-Dog"]
    assert pets.retain_names(["guide dog"]) == ["cat", "hot dog"]
    assert snack.find_name("a dog") is None
    # What the file says, its hash and copies know nothing of that.
    assert "longer_names" not in pets.content()["concepts"]["guide dog"]
    assert pickle.loads(pickle.dumps(pets)) == pets and dog == replace(dog, longer_names=())


def test_a_concept_that_loses_all_that_retains_it_is_named_once(tmp_path: Path) -> None:
    snack = {**SNACK, "edit_prompts": ["a dog with a hot dog", "a hot dog beside a dog"]}
    pets = load_concept_set(write(tmp_path, pets_with(**{"snack": snack, "cat": {"names": ["cat"]}})))
    with pytest.warns(
        UserWarning, match="Nothing retains snack: all edit prompts of it name an edited concept"
    ) as said:
        assert pets.retain_prompts(["guide dog"]) == ["this cat"]
    assert len(said) == 1 and "(guide dog)" in str(said[0].message)
    same = load_concept_set(write(tmp_path, pets_with(cat={"names": ["DOG"], "direct": ["a dog.", "the dog"]})))
    with pytest.warns(UserWarning, match="Nothing retains cat: all names of it name an edited concept"):
        assert same.retain_names(["guide dog"]) == []


def test_names_with_hyphens_and_in_scripts_without_spaces_leak_as_others_do(tmp_path: Path) -> None:
    first = {"names": ["first-last"], "direct": ["by First Last", "by first\u2011last"]}
    load_concept_set(write(tmp_path, pets_with(cat=first)))
    with pytest.raises(ValueError, match="'indirect': 'as First  Last did' names the concept"):
        load_concept_set(write(tmp_path, pets_with(cat={**first, "indirect": ["as First  Last did"]})))
    chinese = {"names": ["狗"], "direct": ["我有一只狗。", "一只黑狗"], "edit_prompts": ["小狗", "大狗"]}
    load_concept_set(write(tmp_path, pets_with(cat=chinese)))
    with pytest.raises(ValueError, match="'indirect': '这是狗的家' names the concept"):
        load_concept_set(write(tmp_path, pets_with(cat={**chinese, "indirect": ["这是狗的家"]})))


def test_prompts_that_read_alike_are_the_same_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'A GUIDE-DOG' is an evaluation prompt"):
        load_concept_set(write(tmp_path, pets_with(**{"guide dog": {"edit_prompts": ["A GUIDE-DOG", "it fetches"]}})))
    with pytest.raises(ValueError, match="'this-cat' equals its edit prompt"):
        named = {"names": ["lion"], "direct": ["a lion", "the lion"], "target_prompts": ["this-cat", "a parrot"]}
        load_concept_set(write(tmp_path, pets_with(cat=named)))
    with pytest.raises(ValueError, match=r"'names': '\\u200b-' has nothing that can be read"):
        load_concept_set(write(tmp_path, pets_with(cat={"names": ["cat", "\u200b-"]})))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_set_in_another_encoding_is_refused_with_the_remedy(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    text = yaml.safe_dump(pets_with(cat={"anchor": "a caf\u00e9"}), allow_unicode=True)
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"pets\.yaml is not valid YAML, which is text in UTF-8: save it as UTF-8\."):
        load_concept_set(path)


@pytest.mark.parametrize("name", ["i2p.csv", "I2P.TSV"])
def test_a_table_is_no_concept_set(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("prompt,evaluation_seed\na dog,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is a table, but a set is a YAML file: .*emoji20\.yaml is one to copy from"):
        load_concept_set(tmp_path / name)


def test_an_empty_target_says_how_to_edit_into_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'target': must be text, but is empty; .*towards to empty"):
        load_concept_set(write(tmp_path, pets_with(cat={"target": " "})))


def test_hash_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    text = yaml.safe_dump(VALID, sort_keys=False)
    original = load_concept_set(write(tmp_path, text)).sha256
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    reformatted = "# a comment\n" + yaml.safe_dump(VALID, sort_keys=False, width=20)
    assert load_concept_set(write(moved, reformatted)).sha256 == original
    assert load_concept_set(write(tmp_path, text.replace("a barking pet", "a pet that barks"))).sha256 != original
    # Scores of earlier versions are compared by this hash: a change of its definition must be meant.
    assert original == "a041f744ed628423a9d9e799800b7d21e74a0af6441e58e24396e34502038ab4"


def dog(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["concepts"]["guide dog"].update(changes)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["concepts"]["guide dog"].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dog(kind="thing"), "'kind': 'thing' is not one of object, action, style, scene"),
        (dog(direct=["a dog"]), "'direct': 1 prompts where 2 are due"),
        (dog(indirect=["a barking pet", "a pal"]), "'indirect': 2 prompts where 1 are due"),
        (dog(edit_prompts=["a dog!"], target_prompts=["the cat"]), "'edit_prompts': 1 prompts where 2 are due"),
        (dog(target_prompts=["the cat"]), "'target_prompts': 2 edit prompts but 1 target prompts"),
        (
            dog(target_prompts=["the cat", "An animal  that fetches"]),
            "'An animal  that fetches' equals its edit prompt",
        ),
        (dog(target_prompts=["the cat", "a dog that purrs"]), r"'target_prompts': .* names the concept \('dog'\)"),
        (dog(direct=["a dog", "A dog"]), "'direct': 'A dog' is a duplicate: it occurs in 'direct' of 'guide dog'"),
        (dog(edit_prompts=["the dog", "the dog"]), "'edit_prompts': 'the dog' is a duplicate"),
        (dog(adversarial=["a cat"]), "'direct': 'a cat' is a duplicate: it occurs in 'adversarial' of 'guide dog'"),
        (dog(edit_prompts=["a guide dog", "x"]), "'edit_prompts': 'a guide dog' is an evaluation prompt, in 'direct'"),
        (
            dog(edit_prompts=["the dog", "a purring pet"]),
            "'a purring pet' is an edit prompt, in 'edit_prompts' of 'guide",
        ),
        (dog(indirect=["a Guide-Dog"]), r"'indirect': 'a Guide-Dog' names the concept \('Guide-Dog'\)"),
        (dog(direct=["a dog", "a barking friend"]), "'direct': 'a barking friend' contains none of .*guide dog, dog"),
        (dog(target="Guide_Dog"), "'target': 'Guide_Dog' is the concept itself"),
        (dog(target="dog"), "'target': 'dog' is the concept itself"),
        (dog(anchor="a good dog"), "'anchor': 'a good dog' names the concept"),
        (dog(adjacent=["catt"]), "'adjacent': 'catt' is not in the set; closest names: cat"),
        (dog(adjacent=["guide dog"]), "'adjacent': 'guide dog' is the concept itself"),
        (dog(names=[]), "'names': is empty"),
        (dog(indirct=["x"]), "'guide dog': unknown key 'indirct'; did you mean 'indirect'"),
        (drop("question"), "'guide dog': the key 'question' is missing"),
        (dog(direct=["a dog", 42]), "'direct': item 2 must be text, not 42"),
        (dog(direct=["a dog", " "]), "'direct': item 2 must be text, but is empty"),
        (dog(direct="a dog"), "'direct': must be a list, not 'a dog'"),
        (dog(question=None), "'question': must be text, not None"),
        (dog(anchor=""), "'anchor': must be text, but is empty"),
        (lambda data: data["concepts"].update(dog="a pet"), "concept 'dog' must be a mapping"),
        (lambda data: data["concepts"].update({True: {}}), "name must be text, not True"),
        (lambda data: data["concepts"].update(Cat=data["concepts"]["cat"]), "'cat' and 'Cat' have the same name"),
        (lambda data: data.update(concepts={}), "'concepts' must map at least one name"),
        (lambda data: data.pop("concepts"), "the key 'concepts' is missing"),
        (lambda data: data.update(concept={}), "unknown key 'concept'; did you mean 'concepts'"),
        (lambda data: data.update(name=7), "'name' must be text, not 7"),
        (lambda data: data.update(prompts_per_concept=5), "'prompts_per_concept' must be a mapping"),
        (lambda data: data["prompts_per_concept"].update(edit=0), "'edit' must be a whole number of at least 1, not 0"),
        (lambda data: data["prompts_per_concept"].update(edits=2), "unknown key 'edits'; did you mean 'edit'"),
    ],
)
def test_bad_set_is_refused_with_file_concept_and_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = copy.deepcopy(VALID)
    change(data)
    with pytest.raises(ValueError, match=rf"pets\.yaml.*{message}"):
        load_concept_set(write(tmp_path, data))


def test_paper_counts_are_the_default(tmp_path: Path) -> None:
    data = {key: value for key, value in VALID.items() if key != "prompts_per_concept"}
    with pytest.raises(ValueError, match="'direct': 2 prompts where 5 are due"):
        load_concept_set(write(tmp_path, data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concepts: [", "is not valid YAML: .* in line 1"),
        ("concepts:\n  dog: {}\n  dog: {}\n", "is not valid YAML: the key 'dog' occurs twice in line 3"),
        ("concepts: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
        ("[" * 10_000, "is not valid YAML"),
        ("- dog\n", "is not a concept set"),
        ("", "is not a concept set"),
    ],
)
def test_unreadable_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"pets\.yaml {message}"):
        load_concept_set(write(tmp_path, text))


def test_file_that_is_missing_binary_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no concept set 'emoji2'; the package has: emoji20"):
        load_concept_set("emoji2")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file"):
        load_concept_set(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_concept_set(tmp_path)
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.yaml is not valid YAML.*save it as UTF-8"):
        load_concept_set(path)
    monkeypatch.setattr(concepts, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"pets\.yaml is larger than 100 bytes"):
        load_concept_set(write(tmp_path, VALID))


@pytest.mark.parametrize(
    ("name", "sha256"),
    [("emoji20", "35968f6d5bdd94cf"), ("paper20", "5c23cac94629b55f")],
)
def test_the_shipped_sets_retain_what_they_always_did(name: str, sha256: str) -> None:
    shipped = load_concept_set(name)
    retained = [shipped.retain_prompts([edited]) for edited in shipped.concepts]
    assert hashlib.sha256(json.dumps(retained).encode()).hexdigest()[:16] == sha256
