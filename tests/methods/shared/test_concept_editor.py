"""A checkpoint of other concepts is refused in one sentence that says what to do, whether it edits any or none."""

from __future__ import annotations

import pytest

from lit_unlearn.methods.shared.editor import check_concepts


@pytest.mark.parametrize(
    ("found", "wanted", "end"),
    [
        ([], ["dog"], "edits no concept (ESD), but concept is dog: give the recipe of its own fit."),
        (["dog"], [], "edits dog, but the recipe edits no concept: give the recipe of its own fit."),
        (["dog", "cat"], ["dog"], 'edits dog, cat, but concept is dog: pass --concept \'["dog", "cat"]\'.'),
        (["soccer ball"], ["dog"], "edits soccer ball, but concept is dog: pass --concept 'soccer ball'."),
    ],
)
def test_what_to_pass_for_a_checkpoint_of_other_concepts(found: list[str], wanted: list[str], end: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_concepts("a.ckpt", "ESD", found, wanted)
    assert str(caught.value) == f"a.ckpt {end}"


def test_the_same_concepts_are_taken() -> None:
    check_concepts("a.ckpt", "ESD", ["dog", "cat"], ["dog", "cat"])
    check_concepts("a.ckpt", "SISS", [], [])
