"""Captions of drawings: direct ("a glossy dog at sunset") and indirect ("the pet that barks and fetches").

The phrases are data (``phrases.yaml``); this module only combines them. A caption always has a subject; style and scene
may be left out. Direct and indirect phrases are mixed freely, so that the model also learns indirect prompts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import yaml

from lit_unlearn.emoji.drawing import ATTRIBUTES, Drawing

FRAMES: tuple[str, ...] = (
    "{}",
    "{}",
    "{}",
    "a picture of {}",
    "an image of {}",
    "this is {}",
    "we see {}",
    "here is {}",
    "look at {}",
    "there is {}",
    "a nice picture of {}",
)
"""Frames of captions; the phrase alone is three times as frequent as any other frame."""

INDIRECT_SHARE = 0.5
UNSAID_STYLE = 0.3
UNSAID_SCENE = 0.1
UNSAID_PLAIN = 0.75
"""A plain background is left out more often than other scenes, as in captions that people write."""
ADJECTIVE_SHARE = 0.6
"""Share of direct styles that are an adjective ("a cartoon dog") instead of an ending ("a dog as a cartoon")."""


@cache
def phrases() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Phrases by attribute, value and kind (``direct``, ``indirect``; styles also ``adjective``)."""
    return yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))


def put_adjective(subject: str, adjective: str) -> str:
    """Put ``adjective`` after the article of ``subject``: ("an owl", "cartoon") becomes "a cartoon owl"."""
    article, rest = subject.split(" ", 1)
    if article in ("a", "an"):
        article = "an" if adjective[0] in "aeiou" else "a"
    return f"{article} {adjective} {rest}"


def caption(drawing: Drawing, rng: np.random.Generator) -> str:
    """Return a random caption that is true of ``drawing``."""
    words = phrases()

    def choose(attribute: str, index: int) -> tuple[str, str]:
        kind = "indirect" if rng.random() < INDIRECT_SHARE else "direct"
        if kind == "direct" and attribute == "style" and rng.random() < ADJECTIVE_SHARE:
            kind = "adjective"
        options = words[attribute][ATTRIBUTES[attribute][index]][kind]
        return kind, options[int(rng.integers(len(options)))]

    _, subject = choose("subject", drawing.subject)
    endings = []
    if rng.random() >= UNSAID_STYLE:
        kind, style = choose("style", drawing.style)
        if kind == "adjective":
            subject = put_adjective(subject, style)
        else:
            endings.append(style)
    unsaid = UNSAID_PLAIN if ATTRIBUTES["scene"][drawing.scene] == "plain" else UNSAID_SCENE
    if rng.random() >= unsaid:
        endings.append(choose("scene", drawing.scene)[1])
    if len(endings) == 2 and rng.random() < 0.5:
        endings.reverse()
    frame = FRAMES[int(rng.integers(len(FRAMES)))]
    return " ".join([frame.format(subject), *endings])


def vocabulary() -> list[str]:
    """Every word that can occur in a caption, in alphabetical order."""
    found = {word for frame in FRAMES for word in frame.replace("{}", "").split()} | {"a", "an"}
    for values in phrases().values():
        for kinds in values.values():
            found |= {word for options in kinds.values() for phrase in options for word in phrase.split()}
    return sorted(found)
