"""Sheets of a run's pictures: edited prompts, adversarial ones and others under headings, with the judge's verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lit_unlearn.data.concepts import Concept
from lit_unlearn.data.prompts import PictureItem
from lit_unlearn.evaluation.grids import Section, sheet
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.evaluation.verdict import verdict_of
from lit_unlearn.methods.shared.concept_editor import ConceptEditor

ON_PURPOSE = "misspelt on purpose, to get around an edit"
"""What is said of adversarial prompts, which look like typing errors."""


class Shown(NamedTuple):
    """A pair of pictures of a test: (3, H, W), uint8, with the judge's answers (at least 0.5: shows its concept)."""

    item: PictureItem
    before: Tensor
    after: Tensor
    shown_before: Tensor
    shown_after: Tensor


def evaluation_sheet(
    module: ConceptEditor, shown: Sequence[Shown], scores: Scores, columns: int, others: int
) -> Image.Image:
    """The pictures of a test before and after the edit, with its verdict.

    Args:
        module: The edited module.
        shown: The pairs to choose from, in their order.
        scores: The scores of the test.
        columns: Pairs in a row.
        others: Number of pairs of other concepts.
    """
    concepts = list(module.concepts.concepts.values())
    edited = {concept.name for concept in module.every_edited}
    parts: dict[str, list[Shown]] = {"edited": [], "adversarial": [], "others": []}
    for one in shown:
        concept = concepts[one.item.concept_index]
        if concept.name not in edited:
            parts["others"].append(one)
        else:
            parts["edited" if one.item.prompt_index < len(concept.prompts) else "adversarial"].append(one)
    parts["others"] = parts["others"][:others]
    names = ", ".join(scores.edited)
    headings = {
        "edited": f"Edited: {names}",
        "adversarial": f"Adversarial prompts for {names}: {ON_PURPOSE}",
        "others": "Other concepts",
    }
    width = min(columns, max(map(len, parts.values())))
    how = "Above: the unedited model; below: the edited one, with the same prompt and seed. "
    how += f"Under each picture: whether the judge, {scores.judge}, sees the prompt's concept."
    return sheet(
        f"{names} edited by {scores.method}",
        [*verdict_of(scores).lines, how],
        [_section(headings[key], of_part, concepts) for key, of_part in parts.items() if of_part],
        columns=width,
    )


def _section(heading: str, shown: Sequence[Shown], concepts: Sequence[Concept]) -> Section:
    pairs = [torch.stack([one[i] for one in shown]).float() / 255 for i in (1, 2)]  # type: ignore[misc]
    names = [concepts[one.item.concept_index].name for one in shown]
    before, after = (
        [_verdict(name, float(one[i])) for name, one in zip(names, shown, strict=True)]  # type: ignore[arg-type]
        for i in (3, 4)
    )
    return Section(heading, pairs[0], pairs[1], [one.item.prompt for one in shown], (before, after))


def _verdict(name: str, answer: float) -> str:
    if math.isnan(answer):
        return "not judged"
    return f"judge: {name}" if answer >= 0.5 else f"judge: no {name}"
