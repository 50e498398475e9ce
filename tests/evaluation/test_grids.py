from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_unlearn.evaluation import grids as pictures
from lit_unlearn.evaluation.grids import GAP, MARGIN, Section, before_after_grid, image_grid, sheet
from lit_unlearn.system.pixels import save_png, to_pil, to_tensor, to_uint8

RED, GREEN, BLUE, GREY = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.5, 0.5, 0.5)
LONG = "the loyal pet that barks, fetches sticks and guards the house in a hatched chalk drawing"


def plain(*colours: tuple[float, float, float], side: int = 8) -> Tensor:
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, side, side)


def boxes(grid: Image.Image, colour: tuple[float, float, float]) -> list[tuple[int, int, int, int]]:
    """Return left, top, right, bottom of the rectangles of a colour, row by row; each must be filled entirely."""
    mask = (np.asarray(grid) == np.round(np.array(colour) * 255)).all(-1)
    found = []
    while mask.any():
        top, left = np.argwhere(mask)[0]
        right = left + int(np.argmin(np.append(mask[top, left:], False)))
        bottom = top + int(np.argmin(np.append(mask[top:, left], False)))
        assert mask[top:bottom, left:right].all()
        mask[top:bottom, left:right] = False
        found.append((int(left), int(top), right, bottom))
    return found


def ink(grid: Image.Image) -> np.ndarray:
    """Return where there is text: dark grey shades, (H, W)."""
    pixels = np.asarray(grid).astype(int)
    return (pixels.max(-1) - pixels.min(-1) < 8) & (pixels.max(-1) < 200)


def test_bytes_are_rounded_cut_and_never_wrap_around() -> None:
    values = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3, float("nan"), float("inf"), -float("inf")])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert to_uint8(values.bfloat16()).dtype == torch.uint8


def test_bytes_to_tensor_and_back_is_exact() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)
    image = to_tensor(pixels)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image, to_tensor(Image.fromarray(pixels)))
    assert np.array_equal(np.asarray(to_pil(image)), pixels)
    assert to_tensor(Image.new("L", (4, 2), 255)).shape == (3, 2, 4)
    with pytest.raises(ValueError, match="float64"):
        to_tensor(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        to_pil(torch.zeros(1, 4, 4))


def test_pictures_stand_in_their_row_and_column_enlarged() -> None:
    grid = image_grid([plain(RED, GREEN), plain(BLUE)], scale=3)
    first, pitch = MARGIN, 24 + GAP
    assert boxes(grid, RED) == [(first, first, first + 24, first + 24)]
    assert boxes(grid, GREEN) == [(first + pitch, first, first + pitch + 24, first + 24)]
    assert boxes(grid, BLUE) == [(first, first + pitch, first + 24, first + pitch + 24)]
    assert grid.size == (2 * MARGIN + 48 + GAP, 2 * MARGIN + 48 + GAP)
    assert grid.getpixel((grid.width - MARGIN - 1, grid.height - MARGIN - 1)) == (255, 255, 255)


def test_enlarging_invents_no_colours() -> None:
    checks = (torch.arange(64).view(8, 8) + torch.arange(8).view(8, 1)).remainder(2).float().expand(1, 3, 8, 8)
    pixels = np.asarray(image_grid([checks], scale=4))
    assert set(np.unique(pixels)) == {0, 255}
    assert np.array_equal(pixels[MARGIN:-MARGIN:4, MARGIN:-MARGIN:4], np.asarray(to_pil(checks[0])))


@pytest.mark.parametrize("side", [8, 64, 256])
def test_captions_stay_in_their_column_above_their_picture(side: int) -> None:
    images = plain(RED, GREEN, BLUE, side=side)
    grid = image_grid([images], column_labels=["", LONG, ""])
    (left, top, right, _) = boxes(grid, GREEN)[0]
    middle = (left + right) / 2
    rows, columns = np.nonzero(ink(grid))
    assert len(rows) > 100
    assert rows.min() >= MARGIN - 1  # not cut at the top
    assert rows.max() < top  # not in the picture
    half = max(side, pictures.CAPTION_WIDTH) / 2
    assert middle - half - 1 <= columns.min() <= columns.max() <= middle + half + 1


@pytest.mark.parametrize("text", [LONG, "Antidisestablishmentarianism" * 3, "one\ntwo  three", "W", ""])
@pytest.mark.parametrize("width", [1, 20, 64, 300])
def test_wrapping_keeps_every_letter_within_the_width(text: str, width: int) -> None:
    font = pictures._font(width)
    lines = pictures._wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)
    if width == 300 and text == LONG:
        assert " ".join(lines) == LONG  # no word is broken that fits


def test_row_labels_stand_left_and_a_long_one_pushes_the_next_row_down() -> None:
    labels = [LONG, "after"]
    grid = image_grid([plain(RED), plain(GREEN)], row_labels=labels)
    (left, _, _, _), (_, top, _, bottom) = boxes(grid, RED)[0], boxes(grid, GREEN)[0]
    marks = ink(grid)
    rows, columns = np.nonzero(marks)
    assert columns.min() >= MARGIN - 1
    assert columns.max() < left
    assert rows.max() < grid.height - MARGIN + 1
    empty = ~marks.any(axis=1)
    # "after" is centred at its row, and between it and the long label above is white.
    assert marks[top - 8 : bottom + 8].any()
    assert empty[top - 10 : top - 6].any()


def test_the_same_seed_stands_before_above_after() -> None:
    before, after = plain(RED, GREEN, RED, GREEN, RED), plain(BLUE, GREY, BLUE, GREY, BLUE)
    grid = before_after_grid(before, after, titles=[f"prompt {i}" for i in range(5)], scale=8, columns=2)
    upper, lower = boxes(grid, RED), boxes(grid, BLUE)
    assert len(upper) == len(lower) == 3  # one in each of three blocks
    for (left, top, right, bottom), (left2, top2, right2, _) in zip(upper, lower, strict=True):
        assert (left, right) == (left2, right2)
        assert top2 == bottom + GAP
        assert bottom - top == right - left == 64
    assert upper[0][3] < lower[0][1] < upper[1][1] < lower[1][1] < upper[2][1]
    assert len({box[0] for box in upper}) == 1  # blocks stand in line


def test_defaults_enlarge_small_pictures_only() -> None:
    small = before_after_grid(plain(RED, side=64), plain(BLUE, side=64))
    assert boxes(small, RED)[0][2] - boxes(small, RED)[0][0] == 128
    large = before_after_grid(plain(*[RED] * 5, side=512), plain(*[BLUE] * 5, side=512))
    assert [box[2] - box[0] for box in boxes(large, RED)] == [512] * 5
    assert large.width < 5 * 512


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "grid.png"
    save_png(path, image_grid([plain(RED)]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"grid.png: No space left"):
            save_png(path, image_grid([plain(BLUE)]))
    assert boxes(Image.open(path).convert("RGB"), RED)
    assert os.listdir(path.parent) == ["grid.png"]


def test_notes_stand_below_their_picture() -> None:
    grid = image_grid([plain(RED, GREEN, side=64), plain(BLUE, RED, side=64)], notes=[["", "judge: dog"], ["", ""]])
    (left, _, right, bottom), below = boxes(grid, GREEN)[0], boxes(grid, BLUE)[0]
    rows, columns = np.nonzero(ink(grid))
    assert len(rows) > 50
    assert bottom <= rows.min() < rows.max() < below[1]  # between its picture and the next row
    assert left <= columns.min() < columns.max() < right
    assert grid.height > image_grid([plain(RED, GREEN, side=64), plain(BLUE, RED, side=64)]).height


def test_a_sheet_has_its_title_and_headings_above_their_pictures() -> None:
    sections = [
        Section("Edited: dog", plain(RED, side=64), plain(RED, side=64)),
        Section("Nothing", plain(RED)[:0], plain(RED)[:0]),
        Section("Other concepts", plain(BLUE, side=64), plain(BLUE, side=64)),
    ]
    grid = sheet("dog edited by uce", ["Erased: yes."], sections)
    marks = ink(grid).any(axis=1)
    starts = [y for y in range(1, len(marks)) if marks[y] and not marks[y - 1]]
    upper, lower = boxes(grid, RED)[0][1], boxes(grid, BLUE)[0][1]
    between = boxes(grid, RED)[-1][3]
    assert len([y for y in starts if y < upper - 20]) >= 3  # title, sentence, heading
    assert [y for y in starts if between < y < lower - 20]
    with pytest.raises(ValueError, match="no pictures"):
        sheet("dog", [], sections[1:2])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        image_grid([])
    with pytest.raises(ValueError, match="no pictures"):
        image_grid([plain(RED)[:0]])
    with pytest.raises(ValueError, match="same H and W"):
        image_grid([plain(RED), plain(RED, side=9)])
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        image_grid([plain(RED)[0]])
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        image_grid([plain(RED), plain(RED)], row_labels=["a"])
    with pytest.raises(ValueError, match="1 column labels for 2 columns"):
        image_grid([plain(RED, RED)], column_labels=["a"])
    with pytest.raises(ValueError, match=r"notes on \[1\] pictures in rows of \[2\]"):
        image_grid([plain(RED, RED)], notes=[["a"]])
    with pytest.raises(ValueError, match="scale=0"):
        image_grid([plain(RED)], scale=0)
    with pytest.raises(ValueError, match="give pairs of the same shape"):
        before_after_grid(plain(RED), plain(RED, RED))
    with pytest.raises(ValueError, match="1 titles for 2 pairs"):
        before_after_grid(plain(RED, RED), plain(RED, RED), ["a"])
    with pytest.raises(ValueError, match="at least one"):
        before_after_grid(plain(RED)[:0], plain(RED)[:0])
    with pytest.raises(ValueError, match="columns=0"):
        before_after_grid(plain(RED), plain(RED), columns=0)
