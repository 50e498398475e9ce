"""Names are found in prompts as people read them, in any script and however a keyboard or a web page writes them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lit_unlearn.data.names import _read_any, find_names, longer_names, name_key, read, replace_spans

FOUND = [
    # what separates words
    ("a blue-jay!", "blue jay", "blue-jay"),
    ("a blue jay", "blue_jay", "blue jay"),
    ("a blue_jay", "Blue-Jay", "blue_jay"),
    ("blue \u2013  jay", "blue jay", "blue \u2013  jay"),
    ("blue\u2011jay", "blue-jay", "blue\u2011jay"),
    ("hot\u00a0dog\n", "hot dog", "hot\u00a0dog"),
    ("two guide_dog's", "dog", "dog"),
    ("by First  Last.", "first-last", "First  Last"),
    # apostrophes
    ("at McDonald\u2019s", "McDonald's", "McDonald\u2019s"),
    ("by O\u00b4Keeffe", "o\u02bckeeffe", "O\u00b4Keeffe"),
    # what nobody sees
    ("a do\u00adg", "dog", "do\u00adg"),
    ("a \u202adog\u202c", "do\u200bg", "dog"),
    ("\u2764\ufe0f!", "\u2764", "\u2764"),
    # forms of the same letters
    ("a \uff24\uff2f\uff27", "dog", "\uff24\uff2f\uff27"),
    ("Bo\ufb01sh", "bofish", "Bo\ufb01sh"),
    ("\U0001d41d\U0001d428\U0001d420", "dog", "\U0001d41d\U0001d428\U0001d420"),
    ("STRASSE", "stra\u00dfe", "STRASSE"),
    ("\u0130stanbul", "istanbul", "\u0130stanbul"),
    ("Barbie\u2122 doll", "barbie", "Barbie"),
    ("a dog\u00b2", "dog", "dog"),
    # marks
    ("a cafe\u0301.", "caf\u00e9", "cafe\u0301"),
    ("by Dali", "Dal\u00ed", "Dali"),
    ("by Dal\u00ed", "Dali", "Dal\u00ed"),
    (
        "\u03a3\u039a\u038e\u039b\u039f\u03a3",
        "\u03c3\u03ba\u03cd\u03bb\u03bf\u03c2",
        "\u03a3\u039a\u038e\u039b\u039f\u03a3",
    ),
    ("\u05db\u05bc\u05b6\u05dc\u05b6\u05d1", "\u05db\u05dc\u05d1", "\u05db\u05bc\u05b6\u05dc\u05b6\u05d1"),
    # scripts without spaces
    ("我有一只狗。", "狗", "狗"),
    ("我的dog很可爱", "dog", "dog"),
    ("热 狗", "热狗", "热 狗"),
    ("かわいい犬です", "犬", "犬"),
    ("ホット・ドッグ", "ホットドッグ", "ホット・ドッグ"),
    ("\uff84\uff9e\uff6f\uff78\uff9e", "ドッグ", "\uff84\uff9e\uff6f\uff78\uff9e"),
    ("หมาน้อย", "หมา", "หมา"),
    # Korean particles
    ("고양이를 본다", "고양이", "고양이"),
    ("dog는", "dog", "dog"),
    (unicodedata.normalize("NFD", "개가 짖다"), "개", unicodedata.normalize("NFD", "개")),
]
NOT_FOUND = [
    ("dogma, hotdog, dogs", "dog"),
    ("a dog", "dog dog"),
    ("blue, jay", "blue jay"),
    ("bluejay", "blue jay"),
    ("トッグ", "ドッグ"),  # another letter
    ("мой", "мои"),
    ("มี", "ม"),
    ("무지개", "개"),  # the end of another word
    ("各", "夂"),
    ("", "dog"),
    ("dog", "\u200b"),
]


@pytest.mark.parametrize(("text", "name", "written"), FOUND)
def test_a_name_is_found_as_it_is_written(text: str, name: str, written: str) -> None:
    assert [text[start:end] for start, end in find_names(text, [name])] == [written]


@pytest.mark.parametrize(("text", "name"), NOT_FOUND)
def test_what_only_looks_alike_is_not_found(text: str, name: str) -> None:
    assert find_names(text, [name]) == []


@example("\u1fef \u1ffd \u0374", "")  # Greek accents that are an apostrophe in the other forms
@given(st.text(), st.text())
def test_how_a_text_is_stored_changes_nothing(text: str, name: str) -> None:
    letters = read(text).letters
    for form in ("NFC", "NFD"):
        assert read(unicodedata.normalize(form, text)).letters == letters
    assert len(letters) == len(read(text).places) == len(read(text).begins) == len(read(text).ends)
    if read(name).letters:
        assert find_names(name, [name]), "every name is found in itself"
        (place, *_) = find_names(f"{text} . {name} .", [name, "."])
        assert place[0] >= 0


def test_names_are_found_from_left_to_right_and_then_in_their_order() -> None:
    assert find_names("neon light, neon", ["neon", "neon light"]) == [(0, 4), (0, 10), (12, 16)]
    assert replace_spans("neon light, neon", [(0, 4), (0, 10), (12, 16)], "X") == "X light, X"


def test_longer_names_are_those_of_others() -> None:
    names = {"dog": ["dog", "guide dog"], "snack": ["Hot-Dogs", "hot_dog"], "热狗": ["热狗"], "狗": ["狗"]}
    assert longer_names(names) == {"dog": ("hot_dog",), "snack": (), "热狗": (), "狗": ("热狗",)}


def test_names_of_concepts_are_compared_without_spaces() -> None:
    assert name_key("Soccer_Ball") == name_key("soccer\u2011ball") == name_key("SoccerBall") == "soccerball"


@given(st.text(st.characters(max_codepoint=127)))
@example("".join(map(chr, range(128))))
@example("a hot-dog's  `dog_2 \x1cx ")
def test_the_quick_way_for_ascii_reads_as_the_general_one(text: str) -> None:
    assert read(text) == _read_any(text)
