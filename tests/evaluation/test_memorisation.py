from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.evaluation.memorisation import (
    CHUNK,
    CopyCount,
    CopyDetector,
    Found,
    copies_grid,
    nearest,
    pixel_features,
)
from lit_unlearn.evaluation.metrics import wilson_interval


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def mean_colour(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


@pytest.fixture
def detector() -> CopyDetector:
    """Four pictures to forget and a hundred held out, all noise."""
    return CopyDetector({"pixels": pixel_features, "colour": mean_colour}, pictures(4, 0), pictures(100, 1), 0.05)


def test_the_distance_in_pixels_is_the_root_mean_square_difference() -> None:
    a, b = pictures(3, 0), pictures(2, 1)
    distance, number = nearest(pixel_features(a), pixel_features(b))
    expected = torch.stack([(a - other).square().mean(dim=(1, 2, 3)).sqrt() for other in b])
    assert_close(distance, expected.min(dim=0).values)
    assert torch.equal(number, expected.argmin(dim=0))
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert float(nearest(pixel_features(black), pixel_features(white))[0]) == pytest.approx(1, abs=1e-6)


def test_the_nearest_is_that_of_brute_force_in_chunks() -> None:
    points, references = torch.randn(CHUNK + 30, 5), torch.randn(7, 5)
    distance, number = nearest(points, references)
    for i in (0, CHUNK - 1, CHUNK, CHUNK + 29):
        distances = (references - points[i]).norm(dim=1)
        assert int(number[i]) == int(distances.argmin())
        assert_close(distance[i], distances.min())


def test_an_identical_picture_is_found_and_an_unrelated_one_is_not(detector: CopyDetector) -> None:
    forget = pictures(4, 0)
    found = detector(forget)
    for space in ("pixels", "colour"):
        assert torch.equal(found[space].distance, torch.zeros(4))
        assert torch.equal(found[space].nearest, torch.arange(4))
        assert found[space].copied.all()
    blurred = (forget + 0.05 * torch.randn(forget.shape)).clamp(0, 1)
    assert detector(blurred)["pixels"].copied.all()
    assert torch.equal(detector(blurred)["pixels"].nearest, torch.arange(4))
    unrelated = detector(pictures(200, 2))["pixels"]
    assert float(unrelated.copied.float().mean()) < 0.2
    assert (unrelated.distance > 0.3).all()


def test_as_many_of_the_held_out_pictures_count_as_copies_as_was_asked_for(detector: CopyDetector) -> None:
    found = detector(pictures(100, 1))
    for space in ("pixels", "colour"):
        assert int(found[space].copied.sum()) == 5
        assert torch.equal(found[space].known, torch.zeros(100))
    assert detector.thresholds["pixels"] != detector.thresholds["colour"]
    assert detector.shown == "colour"


def test_pictures_to_keep_are_known_but_do_not_move_the_threshold(detector: CopyDetector) -> None:
    keep = pictures(5, 3)
    more = CopyDetector(detector.spaces, pictures(4, 0), pictures(100, 1), 0.05, keep)
    assert more.thresholds == detector.thresholds
    assert torch.equal(more(keep)["pixels"].known, torch.zeros(5))
    assert (detector(keep)["pixels"].known > 0.3).all()


def found_at(distance: list[float], number: list[int], copied: list[bool], known: list[float]) -> Found:
    return Found(torch.tensor(distance), torch.tensor(number), torch.tensor(copied), torch.tensor(known))


KINDS = ["forget", "forget", "forget", "keep"]
FOUND = found_at([0.1, 0.2, 0.6, 0.8], [1, 1, 0, 0], [True, True, False, False], [1.0, 2.0, 3.0, 4.0])


def take(found: Found, places: list[int]) -> dict[str, Found]:
    part = Found(found.distance[places], found.nearest[places], found.copied[places], found.known[places])
    return {"pixels": part}


def check(result: dict[str, Any]) -> None:
    forget, keep = result["forget"], result["keep"]
    assert (forget["pictures"], keep["pictures"]) == (3, 1)
    assert forget["pixels"]["copies"] == pytest.approx(2 / 3)
    assert forget["pixels"]["interval"] == wilson_interval(2, 3)
    assert forget["pixels"]["distance"] == pytest.approx(0.3)
    assert forget["pixels"]["known_distance"] == pytest.approx(2.0)
    assert keep["pixels"]["copies"] == 0
    assert forget["drift"] == pytest.approx(0.2)
    assert keep["drift"] == pytest.approx(0.5)
    assert result["copied_images"] == {"pixels": [0, 2]}


DRIFT = torch.tensor([0.1, 0.2, 0.3, 0.5])


def test_copies_are_counted_per_kind_whatever_the_batches() -> None:
    whole, parts = (CopyCount(["pixels"], KINDS, 2) for _ in range(2))
    whole.update(torch.arange(4), take(FOUND, [0, 1, 2, 3]), DRIFT)
    for places in ([3, 1], [0], [2], [0]):  # one of them twice
        parts.update(torch.tensor(places), take(FOUND, places), DRIFT[places])
    for metric in (whole, parts):
        check(metric.compute())


def test_what_two_processes_count_adds_up() -> None:
    ranks = [CopyCount(["pixels"], KINDS, 2) for _ in range(2)]
    for metric, places in zip(ranks, ([0, 2], [1, 3]), strict=True):
        metric.update(torch.tensor(places), take(FOUND, places), DRIFT[places])
    together = CopyCount(["pixels"], KINDS, 2)
    for name in ("values", "drift", "seen"):
        assert together._reductions[name] is not None
        setattr(together, name, getattr(ranks[0], name) + getattr(ranks[1], name))
    together._update_count = 1
    check(together.compute())


def test_what_was_not_looked_at_is_not_counted() -> None:
    metric = CopyCount(["pixels"], KINDS, 2)
    metric.update(torch.tensor([0]), take(FOUND, [0]), DRIFT[:1])
    result = metric.compute()
    assert result["forget"]["pictures"] == 1
    assert "keep" not in result


def test_the_figure_has_four_rows() -> None:
    rows = [pictures(3, seed) for seed in range(4)]
    grid = copies_grid(*rows, captions=["a", "b", "c"])
    assert grid.height > 4 * 96
    assert grid.width > 3 * 96
