"""Draws grids of pictures with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_unlearn.system.pixels import to_pil

MARGIN = 16
"""Space around the grid, between a label and its row, and between blocks, in pixels."""
GAP = 6
"""Space between pictures, and between a caption and its picture, in pixels."""
CAPTION_WIDTH = 64
"""Smallest width of a column with a caption, in pixels; narrower pictures are centred."""
ROW_LABEL_WIDTH = 110
"""Width at which row labels are wrapped, in pixels."""
TITLE_SIZE, HEADING_SIZE = 20, 16
"""Sizes of the title and of a heading, in points."""
INK, PAPER = (32, 32, 32), (255, 255, 255)


def image_grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int = 1,
    notes: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draw rows of pictures on white, with captions above the columns, left of the rows and below the pictures.

    Captions are wrapped to the width of their column and never cut off; a long caption makes its line higher.

    Args:
        rows: Pictures, (N, 3, H, W) each, float in [0, 1]; N may differ between rows, H and W may not.
        row_labels: One per row, or none.
        column_labels: One per column of the longest row, or none.
        scale: Each pixel is enlarged to ``scale`` x ``scale`` pixels, for small pictures.
        notes: For each row the text below each of its pictures, e.g. a judge's verdict; or none.

    Returns:
        The grid, RGB.

    Raises:
        ValueError: No pictures, pictures of different sizes, or a number of labels or notes that does not fit.
    """
    shapes = {tuple(row.shape[1:]) for row in rows}
    if not rows or not any(len(row) for row in rows):
        raise ValueError("There are no pictures to draw a grid of: give at least one row.")
    if len(shapes) > 1 or any(row.ndim != 4 or row.shape[1] != 3 for row in rows):
        raise ValueError(f"Rows have shapes {[tuple(row.shape) for row in rows]}; expected (N, 3, H, W), same H and W.")
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1.")
    columns = max(len(row) for row in rows)
    for field, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if len(labels) not in (0, count):
            raise ValueError(f"{len(labels)} {field} labels for {count} {field}s; give one for each, or none.")
    pictures, noted = [len(row) for row in rows], [len(of_row) for of_row in notes]
    if notes and noted != pictures:
        raise ValueError(f"There are notes on {noted} pictures in rows of {pictures}; give one for each, or none.")

    height, width = (side * scale for side in rows[0].shape[2:])
    font = _font(width)
    column_width = max(width, CAPTION_WIDTH) if column_labels or notes else width
    captions = [_wrap(label, font, column_width - 4) for label in column_labels]
    row_captions = [_wrap(label, font, ROW_LABEL_WIDTH) for label in row_labels]
    top = MARGIN + (max(_text_height(lines, font) for lines in captions) + GAP if captions else 0)
    label_width = max((_text_width(lines, font) for lines in row_captions), default=0)
    left = MARGIN + (label_width + MARGIN if label_width else 0)
    # A row is at least as high as its label.
    pitches = [height] * len(rows)
    for place, lines in enumerate(row_captions):
        pitches[place] = max(height, _text_height(lines, font))
    wrapped = [[_wrap(note, font, column_width - 4) for note in of_row] for of_row in notes] or [[] for _ in rows]
    below = [max((_text_height(lines, font) for lines in of_row), default=0) for of_row in wrapped]

    right = left + columns * column_width + (columns - 1) * GAP
    bottom = top + sum(pitches) + sum(below) + (len(rows) - 1) * GAP
    canvas = Image.new("RGB", (right + MARGIN, bottom + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(captions):
        x, y = left + column * (column_width + GAP), top - GAP - _text_height(lines, font)
        _write(draw, lines, font, x + column_width // 2, y, align="center")
    y = top
    for place, row in enumerate(rows):
        if row_captions:
            lines = row_captions[place]
            middle = y + (pitches[place] - _text_height(lines, font)) // 2
            _write(draw, lines, font, left - MARGIN, middle, align="right")
        for column, image in enumerate(row):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            x = left + column * (column_width + GAP) + (column_width - width) // 2
            canvas.paste(picture, (x, y + (pitches[place] - height) // 2))
        for column, lines in enumerate(wrapped[place]):
            x = left + column * (column_width + GAP) + column_width // 2
            _write(draw, lines, font, x, y + (pitches[place] + height) // 2, align="center")
        y += pitches[place] + below[place] + GAP
    return canvas


def before_after_grid(
    before: Tensor,
    after: Tensor,
    titles: Sequence[str] = (),
    scale: int | None = None,
    columns: int | None = None,
    row_labels: tuple[str, str] = ("before", "after"),
    notes: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Image.Image:
    """Draw the pictures of an edited model under those of the unedited one, same prompt and seed in each column.

    Args:
        before: Pictures of the unedited model, (N, 3, H, W), float in [0, 1].
        after: Pictures of the edited model, same shape.
        titles: One per pair, e.g. its prompt; or none.
        scale: Enlargement; by default pictures become about 128 pixels wide.
        columns: Number of pairs in a row; by default as many as fit in about 1300 pixels, at least 4.
        row_labels: Labels of the upper and the lower row.
        notes: Texts below the pictures of the upper and of the lower row, one per pair; or none.

    Returns:
        The grid, RGB.

    Raises:
        ValueError: No pictures, or shapes, titles or notes that do not fit.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}: give pairs of the same shape."
        )
    if before.ndim != 4 or not len(before):
        raise ValueError(f"The pictures have shape {tuple(before.shape)}; expected (N, 3, H, W) with at least one.")
    if len(titles) not in (0, len(before)):
        raise ValueError(f"{len(titles)} titles for {len(before)} pairs; give one for each, or none.")
    scale = max(1, round(128 / before.shape[3])) if scale is None else scale
    columns = max(4, 1300 // (before.shape[3] * scale + GAP)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    blocks = []
    for start in range(0, len(before), columns):
        part = slice(start, start + columns)
        of_part = [of_row[part] for of_row in notes or ()]
        blocks.append(image_grid([before[part], after[part]], row_labels, titles[part], scale, of_part))
    return _stack(blocks)


@dataclass(frozen=True)
class Section:
    """A part of a sheet: its heading, and pairs of pictures as ``before_after_grid`` takes them."""

    heading: str
    before: Tensor
    after: Tensor
    titles: Sequence[str] = ()
    notes: tuple[Sequence[str], Sequence[str]] | None = None


def sheet(title: str, lines: Sequence[str], sections: Sequence[Section], columns: int | None = None) -> Image.Image:
    """Draw pairs of pictures in sections with headings, below a title.

    Args:
        title: The title; may be empty.
        lines: Sentences below the title.
        sections: The sections; those without pictures are left out.
        columns: As for ``before_after_grid``.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: As ``before_after_grid``, or no section has pictures.
    """
    drawn = [section for section in sections if len(section.before)]
    if not drawn:
        raise ValueError("There are no pictures to draw: give at least one section with a pair.")
    grids = [
        before_after_grid(part.before, part.after, part.titles, columns=columns, notes=part.notes) for part in drawn
    ]
    width = max(grid.width for grid in grids)
    blocks = [_text_block([(title, TITLE_SIZE), *((line, 0) for line in lines)], width)] if title or lines else []
    for part, grid in zip(drawn, grids, strict=True):
        blocks += [_text_block([(part.heading, HEADING_SIZE)], width)] if part.heading else []
        blocks.append(grid)
    return _stack(blocks)


def _text_block(texts: Sequence[tuple[str, int]], width: int) -> Image.Image:
    """Texts below each other, each wrapped to ``width`` and in its size; 0 takes the size of captions."""
    fonts = [ImageFont.load_default(size=size) if size else _font(128) for _, size in texts]
    wrapped = [_wrap(text, font, width - 2 * MARGIN) for (text, _), font in zip(texts, fonts, strict=True)]
    heights = [_text_height(lines, font) for lines, font in zip(wrapped, fonts, strict=True)]
    canvas = Image.new("RGB", (width, MARGIN + sum(heights) + GAP * (len(texts) - 1)), PAPER)
    draw, y = ImageDraw.Draw(canvas), MARGIN
    for lines, font, height in zip(wrapped, fonts, heights, strict=True):
        _write(draw, lines, font, MARGIN, y, align="left")
        y += height + GAP
    return canvas


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    """Put blocks below each other; the space between them is their margins."""
    canvas = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), PAPER)
    y = 0
    for block in blocks:
        canvas.paste(block, (0, y))
        y += block.height
    return canvas


def _font(width: int) -> Any:
    """Return Pillow's own font, larger for larger pictures: 13 points at 128 pixels, 18 at 512."""
    return ImageFont.load_default(size=min(18, max(12, 11 + width // 64)))


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, between words, or within a word that is too long."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                fitting = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        lines.append(line)
    return lines


def _line_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 1


def _text_height(lines: Sequence[str], font: Any) -> int:
    return len(lines) * _line_height(font)


def _text_width(lines: Sequence[str], font: Any) -> int:
    return max((int(font.getlength(line)) + 1 for line in lines), default=0)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], font: Any, x: int, y: int, align: str) -> None:
    """Write lines below each other, starting at y; x is their centre, their left or their right edge."""
    shares = {"center": 0.5, "left": 0.0, "right": 1.0}
    for line in lines:
        start = x - shares[align] * font.getlength(line)
        draw.text((round(start), y), line, fill=INK, font=font)
        y += _line_height(font)
