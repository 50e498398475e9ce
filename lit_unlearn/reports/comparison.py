"""One HTML page, which needs no network, with pictures of the same prompts and seeds by several edits side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment
from torch import Tensor

from lit_unlearn.system.pixels import to_pil

GAIN = 3
"""How much brighter a difference is shown."""
WIDTH = 160
"""Width of a picture on the page, in pixels; smaller pictures are enlarged without smoothing."""


@dataclass(frozen=True)
class Column:
    """Pictures by one edit, or by the unedited model.

    Attributes:
        title: Its heading.
        pictures: (N, 3, H, W), float in [0, 1].
        certainties: By name of a concept, how certain the judge is that it sees the concept, (N,).
    """

    title: str
    pictures: Tensor
    certainties: Mapping[str, Tensor]


def comparison_page(
    title: str, how: str, rows: Sequence[tuple[str, int]], unedited: Column, edited: Sequence[Column]
) -> str:
    """The page.

    Args:
        title: Its title.
        how: A sentence with the models and settings.
        rows: Prompt and seed of each picture (N).
        unedited: Pictures by the unedited model.
        edited: Pictures by each edit.
    """
    columns = [unedited, *edited]
    shown = [
        {"prompt": prompt, "seed": seed, "cells": [_cell(column, unedited, row) for column in columns]}
        for row, (prompt, seed) in enumerate(rows)
    ]
    template = resources.files("lit_unlearn.reports").joinpath("comparison.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        title=title,
        how=how,
        columns=[column.title for column in columns],
        rows=shown,
        gain=GAIN,
        width=WIDTH,
        pixelated=unedited.pictures.shape[-1] < WIDTH,
    )


def _cell(column: Column, unedited: Column, row: int) -> dict[str, object]:
    picture = column.pictures[row]
    difference = None if column is unedited else (picture - unedited.pictures[row]).abs()
    return {
        "picture": picture_uri(picture),
        "difference": None if difference is None else picture_uri((GAIN * difference).clamp(0, 1)),
        "distance": None if difference is None else difference.square().mean().sqrt().item(),
        "verdicts": [
            {"concept": name, "certainty": certainty[row].item(), "shown": certainty[row].item() >= 0.5}
            for name, certainty in column.certainties.items()
        ],
    }


def picture_uri(picture: Tensor) -> str:
    """A picture, (3, H, W), float in [0, 1], as the address of an image: PNG up to 128 pixels, else WebP."""
    buffer = io.BytesIO()
    kind, settings = ("png", {}) if picture.shape[-1] <= 128 else ("webp", {"quality": 85})
    to_pil(picture).save(buffer, kind.upper(), **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
