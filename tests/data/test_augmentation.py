"""Pictures at random scales: where they stand, what their masks and words say."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from lit_unlearn.data.augmentation import WORDS, reframe

GRID = (12, 10)
CELL = 4


def frames(picture: torch.Tensor, count: int = 300) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    return [reframe(picture, GRID, torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_a_picture_fills_its_mask_and_grey_the_rest() -> None:
    red = torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1).expand(3, GRID[0] * CELL, GRID[1] * CELL)
    places = set()
    for picture, mask, words in frames(red):
        assert (picture.shape, mask.shape, mask.dtype) == (red.shape, (1, *GRID), torch.bool)
        pixels = mask[0].repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        # Interpolation of equal colours, in float32.
        assert_close(picture[:, pixels], red[:, pixels], rtol=0, atol=1e-6)
        assert (picture[:, ~pixels] == 0.5).all()
        rows, columns = mask[0].any(dim=1).nonzero().flatten(), mask[0].any(dim=0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        scale = len(rows) / GRID[0]
        assert 1 / 3 - 1 / 24 <= scale <= 1
        if WORDS[words] == ", far away":
            assert scale <= 0.6 + 1 / 24
        elif WORDS[words] == "":
            assert scale >= 0.6 - 1 / 24
        else:
            assert mask.all()
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 20


def test_two_of_three_pictures_are_smaller() -> None:
    kinds = [words for _, _, words in frames(torch.rand(3, 48, 40), 600)]
    # Of 600 draws at 2/3, four standard deviations are 46.
    assert abs(kinds.count(0) + kinds.count(1) - 400) < 46
    # Of those, scales of 1/3 to 0.6 are two fifths; three standard deviations at 160 are 30.
    assert abs(kinds.count(1) - 160) < 40


def test_a_zoomed_picture_is_a_part_of_a_larger_one_and_some_are_mirrored() -> None:
    ramp = torch.linspace(0, 1, 40).expand(3, 48, 40)
    slopes = []
    for picture, _, words in frames(ramp):
        if WORDS[words] == ", zoomed in":
            slopes.append(float((picture[0, :, 20:30].mean(0) - picture[0, :, 10:20].mean(0)).mean()) / 10 * 39)
    # 1 over the scale, whose cells are whole: 12 of 10 or 14 of 10.
    assert {round(abs(slope), 2) for slope in slopes} <= {round(10 / cells, 2) for cells in (12, 13, 14)}
    assert min(slopes) < 0 < max(slopes)


def test_it_depends_on_the_generator_alone() -> None:
    picture = torch.rand(3, 48, 40)
    state = torch.get_rng_state()
    first, again = frames(picture, 20), frames(picture, 20)
    assert all(torch.equal(a[0], b[0]) and a[2] == b[2] for a, b in zip(first, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())
