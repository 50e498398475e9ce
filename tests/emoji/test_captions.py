from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from lit_unlearn.emoji.captions import FRAMES, caption, phrases, put_adjective, vocabulary
from lit_unlearn.emoji.drawing import ATTRIBUTES, Drawing


def captions(drawing: Drawing, number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [caption(drawing, rng) for _ in range(number)]


def drawing_of(subject: str, style: str, scene: str) -> Drawing:
    values = zip(ATTRIBUTES.values(), (subject, style, scene), strict=True)
    return Drawing(*(names.index(value) for names, value in values))


def explanations(text: str) -> set[tuple[str, str | None, str | None]]:
    """Every (subject, style, scene) that ``text`` can be a caption of, taken apart by hand from ``phrases.yaml``."""
    words = phrases()
    bodies = {re.sub(f"^{re.escape(frame.replace('{}', ''))}", "", text) for frame in FRAMES} | {text}
    found = set()
    for subject, kinds in words["subject"].items():
        for phrase, body in product(kinds["direct"] + kinds["indirect"], bodies):
            heads: dict[str, str | None] = {phrase: None}
            for style, style_kinds in words["style"].items():
                heads |= {put_adjective(phrase, adjective): style for adjective in style_kinds["adjective"]}
            for head, adjective_style in heads.items():
                if body == head or body.startswith(f"{head} "):
                    for style, scene in endings(body.removeprefix(head).strip()):
                        if adjective_style is None or style is None:
                            found.add((subject, adjective_style or style, scene))
    return found


def endings(rest: str) -> set[tuple[str | None, str | None]]:
    words = phrases()
    options: dict[str, list[tuple[str | None, str]]] = {}
    for attribute in ("style", "scene"):
        options[attribute] = [(None, "")]
        for value, kinds in words[attribute].items():
            options[attribute] += [(value, phrase) for phrase in kinds["direct"] + kinds["indirect"]]
    return {
        (style, scene)
        for (style, first), (scene, second) in product(options["style"], options["scene"])
        if rest in (f"{first} {second}".strip(), f"{second} {first}".strip())
    }


def test_every_value_has_phrases_of_each_kind() -> None:
    words = phrases()
    for attribute, values in ATTRIBUTES.items():
        assert tuple(words[attribute]) == values
        kinds = {"direct", "indirect", "adjective"} if attribute == "style" else {"direct", "indirect"}
        assert all(set(found) == kinds and all(found.values()) for found in words[attribute].values())


def test_no_phrase_belongs_to_two_values() -> None:
    for values in phrases().values():
        everything = [phrase for kinds in values.values() for kind in kinds.values() for phrase in kind]
        assert len(set(everything)) == len(everything)


def test_subjects_begin_with_an_article_that_fits() -> None:
    for kinds in phrases()["subject"].values():
        for phrase in kinds["direct"] + kinds["indirect"]:
            article, following = phrase.split()[:2]
            assert article in ("a", "an", "the")
            if article != "the":
                assert (article == "an") == (following[0] in "aeiou"), phrase


@pytest.mark.parametrize(
    ("subject", "adjective", "expected"),
    [
        ("an owl", "cartoon", "a cartoon owl"),
        ("a dog", "ink sketch", "an ink sketch dog"),
        ("the pet that barks", "glossy", "the glossy pet that barks"),
    ],
)
def test_an_adjective_takes_the_article_along(subject: str, adjective: str, expected: str) -> None:
    assert put_adjective(subject, adjective) == expected


def test_captions_are_true_of_their_drawing() -> None:
    rng = np.random.default_rng(1)
    for number in range(60):
        drawing = Drawing.sample(rng)
        text = caption(drawing, rng)
        subject, style, scene = (ATTRIBUTES[name][getattr(drawing, name)] for name in ATTRIBUTES)
        found = explanations(text)
        assert found, text
        # Whatever a caption says of an attribute is what is drawn.
        assert {s for s, _, _ in found} == {subject}, (number, text)
        assert {s for _, s, _ in found} <= {style, None}, text
        assert {s for _, _, s in found} <= {scene, None}, text


def test_captions_are_the_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = drawing_of("dog", "glossy", "sunset")
    assert captions(drawing, 20) == captions(drawing, 20)
    assert captions(drawing, 20) != captions(drawing, 20, seed=1)


def test_direct_and_indirect_phrases_and_silence_are_mixed() -> None:
    texts = captions(drawing_of("dog", "glossy", "sunset"), 400)
    assert len(set(texts)) > 300
    kinds = phrases()["subject"]["dog"]
    indirect = sum(any(phrase.split(" ", 1)[1] in text for phrase in kinds["indirect"]) for text in texts)
    # One half, within five standard deviations.
    assert abs(indirect / 400 - 0.5) < 5 * 0.5 / 20
    sunset = phrases()["scene"]["sunset"]
    said = sum(any(phrase in text for phrase in sunset["direct"] + sunset["indirect"]) for text in texts)
    assert abs(said / 400 - 0.9) < 5 * 0.3 / 20


def test_a_plain_background_mostly_goes_unsaid() -> None:
    plain = phrases()["scene"]["plain"]
    texts = captions(drawing_of("dog", "glossy", "plain"), 400)
    said = sum(any(phrase in text for phrase in plain["direct"] + plain["indirect"]) for text in texts)
    assert abs(said / 400 - 0.25) < 5 * 0.43 / 20


def test_the_vocabulary_is_every_word_of_a_caption() -> None:
    words = set(vocabulary())
    assert vocabulary() == sorted(words)
    rng = np.random.default_rng(2)
    for _ in range(2000):
        assert set(caption(Drawing.sample(rng), rng).split()) <= words


def test_words_are_lower_case_letters() -> None:
    # The tokenizer has no other letters and splits numbers from letters.
    assert [word for word in vocabulary() if not re.fullmatch("[a-z]+", word)] == ["3d"]
