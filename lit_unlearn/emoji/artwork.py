"""The sprite sheet of emoji-sd, rendered from the icon sets of three artists.

``sprites.png`` (committed) holds one 96 by 96 RGBA tile per subject (column) and artist (row), so that neither npm nor
a rasteriser is needed to draw or to train. It was made with::

    npm pack @iconify-json/noto @iconify-json/fluent-emoji @iconify-json/fluent-emoji-high-contrast
    tar xzf ...                          # each into a folder of its own
    pip install resvg-py
    python -m lit_unlearn.emoji.artwork NOTO/icons.json FLUENT/icons.json HIGH_CONTRAST/icons.json

Artwork: Noto Emoji (Google, Apache-2.0); Fluent Emoji and Fluent Emoji High Contrast (Microsoft, MIT).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SUBJECTS: dict[str, str] = {
    "apple": "red-apple",
    "lemon": "lemon",
    "daisy": "blossom",
    "tulip": "tulip",
    "dog": "dog-face",
    "cat": "cat-face",
    "owl": "owl",
    "parrot": "parrot",
    "soccer ball": "soccer-ball",
    "basketball": "basketball",
    "castle": "castle",
    "dancing": "woman-dancing",
    "standing": "woman-standing",
    "walking": "man-walking",
    "surfing": "man-surfing",
    "sleeping": "person-in-bed",
}
"""Icon name of each subject; the three sets use the same names."""

ARTISTS: tuple[str, ...] = ("noto", "fluent-emoji", "fluent-emoji-high-contrast")
"""Rows of the sprite sheet."""

TILE = 96
SHEET = Path(__file__).with_name("sprites.png")


def render_sheet(icon_sets: list[Path], output: Path = SHEET) -> None:
    """Rasterise the icons of ``icon_sets`` (an ``icons.json`` per artist, as in ``ARTISTS``) into ``output``."""
    import resvg_py

    sheet = Image.new("RGBA", (TILE * len(SUBJECTS), TILE * len(ARTISTS)))
    for row, path in enumerate(icon_sets):
        icons = json.loads(path.read_text(encoding="utf-8"))
        width, height = icons.get("width", 16), icons.get("height", 16)
        for column, icon in enumerate(SUBJECTS.values()):
            entry = icons["icons"][icon]
            box = f"0 0 {entry.get('width', width)} {entry.get('height', height)}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" color="black">{entry["body"]}</svg>'
            png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * TILE, height=4 * TILE)
            art = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            sheet.paste(fit_tile(art), (column * TILE, row * TILE))
    sheet.save(output, optimize=True)


def fit_tile(art: Image.Image) -> Image.Image:
    """Crop ``art`` to its visible part, centre it in a square and scale it to one tile."""
    box = art.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise ValueError("The icon is empty: nothing was rendered.")
    art = art.crop(box)
    side = max(art.size)
    square = Image.new("RGBA", (side, side))
    square.paste(art, ((side - art.width) // 2, (side - art.height) // 2))
    return square.resize((TILE, TILE), Image.Resampling.LANCZOS)


def load_sprites() -> np.ndarray:
    """Return the sprite sheet as tiles, (3 artists, 16 subjects, 96, 96, 4), uint8 RGBA."""
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"))
    rows, columns = len(ARTISTS), len(SUBJECTS)
    return sheet.reshape(rows, TILE, columns, TILE, 4).transpose(0, 2, 1, 3, 4)


if __name__ == "__main__":
    render_sheet([Path(argument) for argument in sys.argv[1:]])
