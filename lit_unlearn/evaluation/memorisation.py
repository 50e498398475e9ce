"""Finds copies of training pictures among generated ones, by nearest neighbours and a distance threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.evaluation.metrics import wilson_interval

Space = Callable[[Tensor], Tensor]
"""Maps pictures (B, 3, H, W) in [0, 1] to points (B, D), between which distances are measured."""

CHUNK = 256
"""Number of pictures compared at once."""


def pixel_features(images: Tensor) -> Tensor:
    """Pixels of ``images`` (B, 3, H, W) as points (B, 3HW), whose distance is their root-mean-square difference."""
    flat = images.float().flatten(1)
    return flat / flat.shape[1] ** 0.5


def nearest(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (B,) from each of ``points`` (B, D) to the nearest of ``references`` (R, D), and its number (B,)."""
    parts = []
    for part in points.float().split(CHUNK):
        # Without the matrix product, since its rounding would make distances of zero nonzero.
        distances = torch.cdist(part, references.float(), compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(distances.min(dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@dataclass(frozen=True)
class Found:
    """The pictures nearest to some generated pictures.

    Attributes:
        distance: Distance to the nearest picture to forget, (B,).
        nearest: Number of that picture, (B,).
        copied: Whether it is nearer than the threshold, (B,), bool.
        known: Distance to the nearest other picture that the model may draw, (B,); large if there is no similar one.
    """

    distance: Tensor
    nearest: Tensor
    copied: Tensor
    known: Tensor


class CopyDetector:
    """Finds copies of the pictures to forget.

    A picture counts as a copy if its distance to one of them is below a threshold. The threshold is a quantile of the
    distances of held-out pictures, so this share of pictures that are not copies is wrongly taken for copies.

    Args:
        spaces: Spaces in which distances are measured, by name; the last is the one to show.
        forget: The pictures to forget, (k, 3, H, W), in [0, 1].
        held_out: Pictures of the same kind that are not copies, (m, 3, H, W).
        quantile: The quantile, between 0 and 1.
        keep: Further pictures that the model may draw, (n, 3, H, W), or none.

    Attributes:
        thresholds: Distance below which a picture counts as a copy, per space.
    """

    def __init__(
        self,
        spaces: Mapping[str, Space],
        forget: Tensor,
        held_out: Tensor,
        quantile: float,
        keep: Tensor | None = None,
    ) -> None:
        self.spaces = dict(spaces)
        self.forget: dict[str, Tensor] = {}
        self.known: dict[str, Tensor] = {}
        self.thresholds: dict[str, float] = {}
        for name, space in spaces.items():
            self.forget[name], points = space(forget), space(held_out)
            distance, _ = nearest(points, self.forget[name])
            self.thresholds[name] = float(distance.double().quantile(quantile))
            self.known[name] = points if keep is None else torch.cat([points, space(keep)])

    def __call__(self, images: Tensor) -> dict[str, Found]:
        """Find the pictures nearest to ``images`` (B, 3, H, W) in [0, 1], per space."""
        found = {}
        for name, space in self.spaces.items():
            points = space(images)
            distance, number = nearest(points, self.forget[name])
            known, _ = nearest(points, self.known[name])
            found[name] = Found(distance, number, distance < self.thresholds[name], known)
        return found

    @property
    def shown(self) -> str:
        """Name of the space whose nearest pictures are shown."""
        return list(self.spaces)[-1]


class CopyCount(Metric):
    """Counts copies among the pictures of a test; each picture has its own place, so order and batches do not matter.

    Args:
        spaces: Names of the spaces.
        kinds: Kind of each generated picture's caption: ``forget`` or ``keep``.
        num_forget: Number of pictures to forget.
        **kwargs: See ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    values: Tensor
    drift: Tensor
    seen: Tensor

    FIELDS = ("distance", "nearest", "copied", "known")

    def __init__(self, spaces: Sequence[str], kinds: Sequence[str], num_forget: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spaces, self.kinds, self.num_forget = list(spaces), list(kinds), num_forget
        shape = (len(spaces), len(self.FIELDS), len(kinds))
        # Each picture is processed by one process only, so the sum over processes collects all of them.
        # Stored in float32, since some devices do not have float64; averages are computed in float64.
        self.add_state("values", torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("drift", torch.zeros(len(kinds), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(len(kinds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, numbers: Tensor, found: Mapping[str, Found], drift: Tensor) -> None:
        """Add pictures.

        Args:
            numbers: Their places, (B,).
            found: The pictures nearest to them, per space.
            drift: Root-mean-square difference from the unedited model's picture of the same seed, (B,).
        """
        numbers = numbers.to(self.values.device)
        for row, space in enumerate(self.spaces):
            for column, field in enumerate(self.FIELDS):
                self.values[row, column, numbers] = getattr(found[space], field).to(self.values)
        self.drift[numbers] = drift.to(self.drift)
        self.seen[numbers] = 1

    def compute(self) -> dict[str, Any]:
        """Per kind the number of pictures, and per space the share of copies, its interval and mean distances.

        ``copied_images``: per space, for each picture to forget, its copies among the pictures of captions to forget.
        """
        result: dict[str, Any] = {}
        seen, drift, values = self.seen.cpu().bool(), self.drift.cpu().double(), self.values.cpu().double()
        for kind in ("forget", "keep"):
            places = seen & torch.tensor([k == kind for k in self.kinds], dtype=torch.bool)
            count = int(places.sum())
            if not count:
                continue
            entry: dict[str, Any] = {"pictures": count, "drift": float(drift[places].mean())}
            for row, space in enumerate(self.spaces):
                distance, _, copied, known = values[row][:, places]
                copies = int(copied.sum())
                entry[space] = {
                    "copies": copies / count,
                    "interval": wilson_interval(copies, count),
                    "distance": float(distance.mean()),
                    "known_distance": float(known.mean()),
                }
            result[kind] = entry
        forget = seen & torch.tensor([k == "forget" for k in self.kinds], dtype=torch.bool)
        result["copied_images"] = {
            space: torch.bincount(
                values[row, 1, forget & values[row, 2].bool()].long(), minlength=self.num_forget
            ).tolist()
            for row, space in enumerate(self.spaces)
        }
        return result


def copies_grid(
    before: Tensor, nearest_before: Tensor, after: Tensor, nearest_after: Tensor, captions: Sequence[str]
) -> Image.Image:
    """Draw each generated picture above the picture to forget that is nearest to it, before and after unlearning.

    Args:
        before: Pictures of the unedited model, (N, 3, H, W), float in [0, 1].
        nearest_before: For each of these, the nearest picture to forget, same shape.
        after: Pictures of the edited model, same seeds, same shape.
        nearest_after: For each of these, the nearest picture to forget, same shape.
        captions: One per column.

    Returns:
        The grid, RGB.
    """
    labels = ["before", "nearest to forget", "after", "nearest to forget"]
    scale = max(1, round(96 / before.shape[3]))
    return image_grid([before, nearest_before, after, nearest_after], labels, captions, scale)
