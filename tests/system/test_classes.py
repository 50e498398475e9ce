from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lit_unlearn import attacks
from lit_unlearn.attacks.base import Attack
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.system.classes import checked_arguments, class_path, declared_classes, describe, import_class


class Lamp:
    """Shines.

    Args:
        watts: How much it takes.
        colour: What it looks like.
    """

    def __init__(self, watts: int, colour: str = "white", *, dimmed: bool = False) -> None: ...


def test_a_class_is_found_by_the_name_that_it_declares_itself() -> None:
    found = declared_classes(attacks, Attack, "name")  # type: ignore[type-abstract]
    assert found["relearning"] is Relearning
    assert Attack not in found.values()  # it declares none
    assert import_class(class_path(Relearning), "attacks") is Relearning


def test_arguments_become_what_their_annotations_say() -> None:
    given = {"watts": "40", "dimmed": "true"}
    assert checked_arguments(Lamp, given, "lamp", "Lamp") == {"watts": 40, "dimmed": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "lamp.watts is missing: Lamp needs it."),
        ({"watts": "bright"}, "lamp.watts: int expected, got bright."),
        ({"watts": 1, "size": 2}, "lamp.size is unknown to Lamp: it has watts, colour."),
        ({"watts": 1, "dimmed": True}, "lamp.dimmed is unknown to Lamp: it has watts, colour."),
    ],
)
def test_arguments_that_do_not_fit_are_named(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        checked_arguments(Lamp, given, "lamp", "Lamp", skip=["dimmed"])
    assert str(refused.value) == message


def test_a_listing_says_what_a_class_takes() -> None:
    text = describe({"lamp": Lamp}, skip=["dimmed"])
    assert text.startswith("lamp: Shines.\n")
    assert "--lamp.watts" in text
    assert "What it looks like. (type: str, default: white)" in text
    assert "dimmed" not in text
    assert "--options.colour" in describe({"lamp": Lamp}, "options")
