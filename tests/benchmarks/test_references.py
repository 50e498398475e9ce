"""Counts of the costs that the restatements of other codes have, and of ours; seconds are not asserted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import references
import torch
from costs import Cost, Row, counted, table
from reference_steps import esd_row, step_rows
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.closed_form import null_space_update
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.pipeline import Pipeline

EDITED, KEPT, WIDTHS, LENGTH = ["red lamp", "old horse"], ["wet glass", "tall boat", "dry apple"], [16, 24, 16], 32
WEIGHTS = references.random_weights(WIDTHS, 32)


@pytest.fixture
def pipeline(tiny_sd: Path) -> Pipeline:
    return load_pipeline(str(tiny_sd))


def cost(pipeline: Pipeline, run: Callable[[], list[Tensor]]) -> tuple[tuple[int, int, int], list[Tensor]]:
    """Prompts and positions that are encoded, matrices that are factorised, and the result."""
    with torch.no_grad(), counted(pipeline.texts[0].model) as found:
        result = run()
    return (found.encodes, found.positions, found.factorised), result


def test_uce_of_2025_encodes_distinct_texts_and_ours_only_what_is_read(pipeline: Pipeline) -> None:
    texts = pipeline, WEIGHTS, EDITED, KEPT
    theirs, expected = cost(pipeline, partial(references.uce_2025, *texts))
    # Each distinct text alone, the empty guide among them; an inverse for each matrix.
    assert theirs == (6, 6 * LENGTH, 3)
    ours, found = cost(pipeline, partial(references.our_uce, *texts, "2025"))
    assert ours[0] == 6
    assert ours[1] < theirs[1]
    assert ours[2] == 2  # one factorisation, and the spectrum for its condition number
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine.float(), other, rtol=0, atol=1e-3)  # their inverse is of float32


def test_uce_of_2023_encodes_everything_anew_for_every_matrix(pipeline: Pipeline) -> None:
    texts = pipeline, WEIGHTS, EDITED, KEPT
    theirs, expected = cost(pipeline, partial(references.uce_2023, *texts, layers=3))
    assert theirs == (3 * 2 * (2 + 1 + 3), 3 * 2 * 6 * LENGTH, 3)  # pairs, also of the empty prompt with itself
    ours, found = cost(pipeline, partial(references.our_uce, *texts, "2023"))
    assert ours == (3 + 4, 7 * LENGTH, 2)  # two phrases and a guide; three preserved names and the empty prompt
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine.float(), other, rtol=0, atol=1e-2)


def test_speed_encodes_equal_anchors_anew(pipeline: Pipeline) -> None:
    texts = pipeline, WEIGHTS, EDITED, KEPT
    theirs, _ = cost(pipeline, partial(references.speed, *texts))
    # Every edited and every retained text, an anchor for each edit, and the empty prompt, alone and whole; three
    # inverses and two decompositions for each matrix.
    encodes = 2 + 2 + 3 + 1
    assert theirs == (encodes, encodes * LENGTH, 3 * 5)
    ours, _ = cost(pipeline, partial(references.our_speed, *texts))
    assert ours[0] == 2 + 1 + 3 + 1  # the anchor once; all positions of the empty prompt for the invariants
    read = ours[1] - LENGTH
    assert read <= 6 * 5  # as far as the last token of the longest name: two words between two marks
    # For each matrix: two systems, the spectrum of one, and the weight, the retained keys and the invariants.
    assert ours[2] == 3 * 6


def test_a_closed_form_is_solved_over_the_smaller_side() -> None:
    weight, keys, values, space, _ = references.layer(4, 48, 16)
    with counted() as found:
        update = null_space_update(weight.double(), keys, values, space, 10.0)
    assert found.factorised == 1
    other = references.alpha_edit(weight, keys, values, space.projection.float())
    assert_close(update.float(), other, rtol=0, atol=1e-4)


def test_esd_with_kept_states_takes_three_forwards_a_step(tiny_sd: Path) -> None:
    row = esd_row(steps=4, chain=4, repeats=1, model=str(tiny_sd))
    # A stop at 0, 1, 2, 3 of 4: two forwards for each step of the chain, and three predictions.
    assert row.theirs.forwards == 2 * (0 + 1 + 2 + 3) + 3 * 4
    assert row.ours.forwards == 2 * 4 + 4


@pytest.mark.slow
def test_steps_of_the_gradient_codes_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ablation, forgetting, deletion = step_rows(steps=3, repeats=1)
    # Two steps of 8 pictures: with the regulariser 16 forwards and 8 without a gradient; ours take the live ones.
    assert (ablation.theirs.forwards, ablation.ours.forwards) == (2 * 24, 2 * 16)
    assert (ablation.theirs.encodes, ablation.ours.encodes) == (2 * 24, 0)
    assert (ablation.theirs.pictures, ablation.ours.pictures) == (2 * 16, 0)
    assert (forgetting.theirs.forwards, forgetting.ours.forwards) == (2, 2)
    assert (forgetting.theirs.pictures, forgetting.ours.pictures) == (2, 0)
    assert (deletion.theirs.forwards, deletion.ours.forwards) == (2 * 16, 2 * 16)
    assert (deletion.theirs.pictures, deletion.ours.pictures) == (2 * 32, 0)
    assert deletion.ours.encodes == 0


def test_the_table_has_a_row_for_each_comparison() -> None:
    row = Row("UCE", "code abc", Cost(2.0, 6, 60, 3), Cost(0.5, 6, 30, 2), "a note")
    text = table([row], "command", "1", 3)
    assert "| UCE | code abc | 2.00 / 0.50 | 0.25 | 6 / 6 | 60 / 30 | 3 / 2 |  |  |" in text
    assert "- UCE: a note." in text
