from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from PIL import Image

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.emoji.artwork import ARTISTS, SHEET, SUBJECTS, TILE, fit_tile, load_sprites
from lit_unlearn.emoji.data import DrawingDataset, Drawings, blur
from lit_unlearn.emoji.drawing import ATTRIBUTES, DARK_SCENES, JITTER, RESOLUTION, SIZES, VARIANTS, Drawing, scenes

STYLES, SCENES = ATTRIBUTES["style"], ATTRIBUTES["scene"]


def draw(subject: str, style: str, scene: str, seed: int = 0) -> np.ndarray:
    values = zip(ATTRIBUTES.values(), (subject, style, scene), strict=True)
    return Drawing(*(names.index(value) for names, value in values)).draw(np.random.default_rng(seed))


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference in grey levels of 255."""
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


# --- artwork


def test_the_sheet_has_a_tile_for_each_subject_and_artist() -> None:
    with Image.open(SHEET) as sheet:
        assert sheet.size == (TILE * 16, TILE * 3)
    tiles = load_sprites()
    assert tiles.shape == (len(ARTISTS), len(SUBJECTS), TILE, TILE, 4) == (3, 16, 96, 96, 4)
    ink = (tiles[..., 3] > 127).mean(axis=(2, 3))
    # Each icon fills its tile from edge to edge in one direction, and at least a tenth of its area.
    assert (ink > 0.1).all()
    visible = tiles[..., 3] > 8
    extent = np.maximum(visible.any(axis=2).sum(axis=-1), visible.any(axis=3).sum(axis=-1))
    assert (extent >= TILE - 2).all()


def test_no_two_tiles_are_the_same() -> None:
    tiles = load_sprites().reshape(-1, TILE, TILE, 4)
    for first, second in combinations(range(len(tiles)), 2):
        assert distance(tiles[first], tiles[second]) > 2


def test_an_icon_is_cropped_centred_and_scaled() -> None:
    art = Image.new("RGBA", (200, 200))
    art.paste((255, 0, 0, 255), (20, 50, 60, 70))  # 40 wide, 20 high
    tile = np.asarray(fit_tile(art))
    rows, columns = np.nonzero(tile[..., 3] > 127)
    assert (columns.min(), columns.max()) == (0, TILE - 1)
    assert (rows.min(), rows.max()) == (TILE // 4, 3 * TILE // 4 - 1)
    with pytest.raises(ValueError, match="The icon is empty"):
        fit_tile(Image.new("RGBA", (10, 10)))


# --- drawings


def test_a_drawing_is_determined_by_its_generator() -> None:
    first, again, other = (draw("dog", "cartoon", "rain", seed) for seed in (3, 3, 4))
    assert (first.shape, first.dtype) == ((RESOLUTION, RESOLUTION, 3), np.uint8)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_combination_can_be_drawn_and_told_apart() -> None:
    pictures = [draw(*values) for values in product(*ATTRIBUTES.values())]
    assert len(pictures) == 16 * 4 * 5
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_styles_differ_from_each_other_in_every_scene() -> None:
    for subject, scene in product(("dog", "apple", "walking"), SCENES):
        for first, second in combinations(STYLES, 2):
            # One seed, so place, size and scene are the same and the style alone differs; most of a picture is scene.
            assert distance(draw(subject, first, scene), draw(subject, second, scene)) > 2, (subject, scene)


def test_pixel_art_has_blocks_and_a_sketch_has_no_colour() -> None:
    scene = scenes()[SCENES.index("plain")]
    for seed in range(5):
        pixels = draw("dog", "pixel art", "plain", seed)
        inside = np.abs(pixels[None].astype(float) - scene[:, :1, :1] * 255).max(axis=-1).min(axis=0) > 2
        # Within three rows and three columns of a block all pixels are alike, wherever the sprite lies.
        jumps = (np.abs(np.diff(pixels.astype(int), axis=1)).max(axis=-1) > 0) & inside[:, 1:]
        assert len({int(column) % 3 for column in np.nonzero(jumps.any(axis=0))[0]}) <= 2
        sketch = draw("dog", "sketch", "plain", seed).astype(int)
        # A black sprite over one tint: every pixel is a multiple of the tint.
        tint = sketch[0, 0]
        assert np.abs(sketch / tint - (sketch / tint).mean(axis=-1, keepdims=True)).max() < 0.02


@pytest.mark.parametrize("scene", SCENES)
def test_a_sketch_is_chalk_on_dark_scenes_and_ink_on_others(scene: str) -> None:
    sketch, empty = draw("castle", "sketch", scene).astype(int), scenes()[SCENES.index(scene)] * 255
    change = (sketch[None] - empty).mean(axis=-1)
    nearest = change[np.abs(change).mean(axis=(1, 2)).argmin()]  # the variant of the scene that was drawn on
    assert (nearest.sum() > 0) == (scene in DARK_SCENES)


def test_sprites_stay_inside_the_picture_wherever_they_lie() -> None:
    margin = (RESOLUTION - max(SIZES)) // 2
    assert margin >= JITTER


def test_scenes_have_variants_that_differ() -> None:
    for name, variants in zip(SCENES, scenes(), strict=True):
        assert variants.shape == (VARIANTS, RESOLUTION, RESOLUTION, 3)
        assert (variants.min() >= 0) and (variants.max() <= 1)
        for first, second in combinations(variants, 2):
            assert not np.array_equal(first, second), name


def test_attributes_are_drawn_uniformly() -> None:
    rng = np.random.default_rng(0)
    drawings = [Drawing.sample(rng) for _ in range(4000)]
    for place, values in enumerate(ATTRIBUTES.values()):
        index = [(drawing.subject, drawing.style, drawing.scene)[place] for drawing in drawings]
        counts = np.bincount(index, minlength=len(values))
        # Binomial counts: five standard deviations at most.
        expected = 4000 / len(values)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_the_concepts_of_emoji20_can_be_drawn() -> None:
    values = {value for names in ATTRIBUTES.values() for value in names}
    assert set(load_concept_set("emoji20").concepts) <= values


# --- data sets


def test_items_are_reproducible_by_index() -> None:
    first, again = (DrawingDataset(50, "train", seed=1) for _ in range(2))
    backwards = [again[i] for i in reversed(range(50))][::-1]
    for i in range(50):
        item, other = first[i], backwards[i]
        assert torch.equal(item["images"], other["images"])
        assert torch.equal(item["labels"], other["labels"])
        assert item["captions"] == other["captions"]
    assert (first[0]["images"].shape, first[0]["images"].dtype) == ((3, RESOLUTION, RESOLUTION), torch.float32)
    assert all(item["images"].abs().max() <= 1 for item in backwards)
    assert DrawingDataset(50, "train", seed=2)[0]["captions"] != first[0]["captions"] or not torch.equal(
        DrawingDataset(50, "train", seed=2)[0]["images"], first[0]["images"]
    )
    with pytest.raises(IndexError):
        first[50]


def test_labels_say_what_is_drawn() -> None:
    item = DrawingDataset(20, "train")[7]
    rng = np.random.default_rng((0, 0, 7))
    drawing = Drawing.sample(rng)
    assert item["labels"].tolist() == [drawing.subject, drawing.style, drawing.scene]
    expected = torch.from_numpy(drawing.draw(rng)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(item["images"], expected)


def test_the_splits_share_no_item() -> None:
    data = Drawings(batch_size=20, steps_per_epoch=20, num_validation=400)
    assert len(data.train_dataloader()) == 20

    def items(part: DrawingDataset) -> list[tuple[str, bytes]]:
        return [(part[i]["captions"], part[i]["images"].numpy().tobytes()) for i in range(400)]

    train, validation = items(data.train), items(data.validation)
    assert not set(train) & set(validation)
    assert len(set(train)) == len(set(validation)) == 400
    # Few enough pictures exist (320 combinations, 6 scenes, 2 sizes, 25 places) that two of 400 may be the same.
    pictures = [{picture for _, picture in part} for part in (train, validation)]
    assert len(pictures[0] & pictures[1]) < 10


def test_blur_mixes_with_the_mean_of_the_neighbours() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(blur(images, torch.zeros(2)), images)
    blurred = blur(images, torch.tensor([1.0, 0.5]))
    mean = images[0, :, 2:5, 3:6].mean(dim=(1, 2))
    assert torch.allclose(blurred[0, :, 3, 4], mean, atol=1e-6)
    corner = images[1, :, :2, :2].mean(dim=(1, 2))
    assert torch.allclose(blurred[1, :, 0, 0], (images[1, :, 0, 0] + corner) / 2, atol=1e-6)
