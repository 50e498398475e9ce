"""Draws the pictures that emoji-sd and its judge learn from: a sprite in a style, in front of a scene.

There are 16 subjects, 4 styles and 5 scenes, with only two sizes, a few pixels of jitter and six variants of each
scene, so that a laptop can learn them. Drawing a picture takes well under a millisecond, so no data set is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lit_unlearn.emoji.artwork import SUBJECTS, load_sprites

RESOLUTION = 48
SIZES = (33, 36)
JITTER = 2
VARIANTS = 6
BLOCK = 3
"""Side of a block of the pixel-art style, in pixels."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "style": ("cartoon", "glossy", "sketch", "pixel art"),
    "scene": ("plain", "sunset", "rain", "aurora", "neon"),
}
"""The three attributes of a picture and their values; the judge has one head for each."""

DARK_SCENES = ("aurora", "neon")


@dataclass(frozen=True)
class Drawing:
    """The content of a picture, as indices into the values of ``ATTRIBUTES``."""

    subject: int
    style: int
    scene: int

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Drawing:
        """Draw each attribute uniformly."""
        return cls(*(int(rng.integers(len(values))) for values in ATTRIBUTES.values()))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return a picture, (48, 48, 3), uint8 RGB; position, size and variant of the scene come from ``rng``."""
        scene = scenes()[self.scene][int(rng.integers(VARIANTS))]
        size = int(rng.integers(len(SIZES)))
        ink = 1 if ATTRIBUTES["scene"][self.scene] in DARK_SCENES else 0
        sprite = sprites()[self.style, ink][size][self.subject]
        side = sprite.shape[0]
        margin = (RESOLUTION - side) // 2
        top, left = (margin + int(shift) for shift in rng.integers(-JITTER, JITTER + 1, size=2))
        picture = scene.copy()
        window = picture[top : top + side, left : left + side]
        window[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * window
        return (picture.clip(0, 1) * 255).round().astype(np.uint8)


@cache
def sprites() -> dict[tuple[int, int], list[np.ndarray]]:
    """Premultiplied sprites in [0, 1] by (style, ink): per size an array (16, side, side, 4); ink 1 is chalk."""
    noto, fluent, contrast = load_sprites()
    chalk = contrast.copy()
    chalk[..., :3] = 255
    black = contrast.copy()
    black[..., :3] = 0
    by_style: list[tuple[np.ndarray, np.ndarray]] = [(noto, noto), (fluent, fluent), (black, chalk), (noto, noto)]
    return {
        (style, ink): [np.stack([_scale(tile, side, blocks=style == 3) for tile in inks[ink]]) for side in SIZES]
        for style, inks in enumerate(by_style)
        for ink in (0, 1)
    }


def _scale(tile: np.ndarray, side: int, blocks: bool) -> np.ndarray:
    # Colour is premultiplied before averaging, since transparent pixels carry a meaningless colour.
    alpha = tile[..., 3:].astype(np.float32) / 255
    layers = np.concatenate([tile[..., :3].astype(np.float32) / 255 * alpha, alpha], axis=-1)
    target = side // BLOCK if blocks else side
    layers = np.stack(
        [
            np.asarray(Image.fromarray(layers[..., channel]).resize((target, target), Image.Resampling.BOX))
            for channel in range(4)
        ],
        axis=-1,
    )
    if not blocks:
        return layers
    solid = layers[..., 3:] >= 0.45
    layers = np.where(solid, layers / np.maximum(layers[..., 3:], 1e-6), 0)
    return layers.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1).astype(np.float32)


@cache
def scenes() -> list[np.ndarray]:
    """Backgrounds in [0, 1], one array (6 variants, 48, 48, 3) per scene; always the same ones."""
    painters = (_plain, _sunset, _rain, _aurora, _neon)
    return [
        np.stack([painter(np.random.default_rng(1000 * index + variant)) for variant in range(VARIANTS)])
        for index, painter in enumerate(painters)
    ]


def _gradient(*stops: tuple[float, tuple[int, int, int]]) -> np.ndarray:
    rows = np.linspace(0, 1, RESOLUTION)
    positions = [position for position, _ in stops]
    columns = [np.interp(rows, positions, [colour[c] for _, colour in stops]) for c in range(3)]
    return np.repeat(np.stack(columns, axis=-1)[:, None], RESOLUTION, axis=1).astype(np.float32) / 255


def _paint(background: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    # Shapes are drawn at 256 pixels and averaged down, for soft edges.
    image = Image.fromarray((background * 255).round().astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)
    return image, ImageDraw.Draw(image)


def _shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX), dtype=np.float32) / 255


def _plain(rng: np.random.Generator) -> np.ndarray:
    tint = 255 - rng.integers(0, 24, size=3)
    return np.full((RESOLUTION, RESOLUTION, 3), tint / 255, dtype=np.float32)


def _sunset(rng: np.random.Generator) -> np.ndarray:
    shift = float(rng.uniform(-0.08, 0.08))
    sky = _gradient(
        (0, (94, 36, 112)), (0.4 + shift, (226, 74, 66)), (0.72 + shift, (255, 176, 64)), (0.8, (255, 214, 120))
    )
    image, pen = _paint(sky)
    x, radius = int(rng.integers(40, 216)), int(rng.integers(26, 36))
    pen.ellipse((x - radius, 190 - radius, x + radius, 190 + radius), fill=(255, 240, 180))
    pen.rectangle((0, 204, 256, 256), fill=(58, 24, 66))
    return _shrink(image)


def _rain(rng: np.random.Generator) -> np.ndarray:
    image, pen = _paint(_gradient((0, (92, 106, 128)), (1, (150, 166, 186))))
    for _ in range(46):
        x, y, length = int(rng.integers(-20, 276)), int(rng.integers(-20, 256)), int(rng.integers(22, 40))
        pen.line((x, y, x - length // 3, y + length), fill=(214, 230, 246), width=4)
    return _shrink(image)


def _aurora(rng: np.random.Generator) -> np.ndarray:
    image, pen = _paint(_gradient((0, (10, 12, 44)), (1, (16, 30, 62))))
    for band, colour in enumerate([(40, 210, 130), (70, 240, 170), (130, 80, 210)]):
        phase, base = rng.uniform(0, 2 * np.pi), 50 + 50 * band + int(rng.integers(-14, 15))
        top = [(x, base + 20 * np.sin(x / 42 + phase)) for x in range(0, 257, 8)]
        pen.polygon(top + [(x, y + 30) for x, y in reversed(top)], fill=colour)
    return _shrink(image.filter(ImageFilter.GaussianBlur(9)))


def _neon(rng: np.random.Generator) -> np.ndarray:
    image, pen = _paint(_gradient((0, (20, 8, 34)), (1, (34, 12, 52))))
    colours = [(255, 50, 160), (40, 230, 255), (255, 220, 60)]
    for bar, colour in enumerate(colours * 2):
        at = 18 + 42 * bar + int(rng.integers(-10, 11))
        box = (at, 0, at + 9, 256) if bar % 2 else (0, at, 256, at + 9)
        pen.rectangle(box, fill=colour)
    return _shrink(image.filter(ImageFilter.GaussianBlur(2)))
