from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_unlearn.data import concepts
from lit_unlearn.data.concepts import ConceptSet, load_concept_set

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
        (dog(kind="thing"), "'kind': 'thing' is not one of object, person, character"),
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
        (
            lambda data: data["concepts"].update({"c\nt": data["concepts"]["cat"]}),
            "holds control characters; rename it",
        ),
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


def test_prompts_of_the_set_are_retained_unless_they_name_what_is_edited_and_are_never_judged(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    data["retain"] = ["a red bicycle", "a dog in the sun"]
    found = load_concept_set(write(tmp_path, data))
    assert "a red bicycle" in found.retain_prompts(["guide dog"])
    assert found.sha256 != load_concept_set(write(tmp_path, copy.deepcopy(VALID))).sha256
    data["retain"] = [next(iter(data["concepts"].values()))["direct"][0]]
    with pytest.raises(ValueError, match=r"field 'retain': .* is an evaluation prompt"):
        load_concept_set(write(tmp_path, data))
    data["retain"] = [7]
    with pytest.raises(ValueError, match="field 'retain': item 1 must be text"):
        load_concept_set(write(tmp_path, data))


def test_set_without_indirect_prompts(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    data["prompts_per_concept"]["indirect"] = 0
    for concept in data["concepts"].values():
        del concept["indirect"]
    assert load_concept_set(write(tmp_path, data)).counts.indirect == 0
