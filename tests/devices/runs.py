"""What runs leave behind, read so that two of them can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-6
"""Of a weight, or of the largest of its tensor if that is more than 1.

The device computes on the processor, so what differs is the order in which PyTorch adds up, and float32 has 24 bits.
"""
DESCENDING = {"null_space_robust": 3e-5}
"""The same for recipes that learn what to edit: Adam makes whole steps of gradients that are rounding."""
LITTLE = 1e-2
"""Of the difference of all weights as a share of their change, beside the rounding of the weights that are stored."""
MEASURED = ("cost", "drawn", "seconds", "config_sha256", "checkpoint", "drift", "edit")
"""What depends on clocks, on paths, or is a number with all its digits."""


def run_folder(folder: Path) -> Path:
    """The only run below ``folder``."""
    (found,) = folder.glob("logs/**/version_0")
    return found


def state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint below ``folder`` holds."""
    (path,) = folder.glob("logs/**/last.ckpt")
    return torch.load(path, weights_only=True, map_location="cpu")


def weights(folder: Path) -> dict[str, Tensor]:
    """Edited or trained weights by name."""
    return state(folder)["state_dict"]


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Assert that two fits have ended with the same weights, and that these are not those ``before``, if they were."""
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        difference = float((found[name] - value).abs().max())
        assert difference <= tolerance * max(1.0, float(value.abs().max())), f"{name} differs by {difference:.2g}"
    known = [name for name in expected if name in before]
    if known:
        change = norm(expected[name] - before[name] for name in known)
        assert change > 0, "the fit has changed nothing"
        difference = norm(found[name] - expected[name] for name in known)
        rounding = norm(torch.finfo(expected[name].dtype).eps * expected[name] for name in known)
        assert difference <= LITTLE * change + rounding, f"they differ by {difference:.2g}, the change is {change:.2g}"


def norm(tensors: Iterable[Tensor]) -> float:
    """Of all numbers in ``tensors``."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def assert_same_gradients(found: Path, expected: Path) -> None:
    """Assert that Adam's means of the gradients are equal, after two steps of a training.

    Its weights are not: Adam makes whole steps of gradients that are rounding, such as a bias's before a normalisation.
    """
    one, other = (state(folder)["optimizer_states"][0]["state"] for folder in (found, expected))
    assert one.keys() == other.keys()
    largest = max(float(entry["exp_avg"].abs().max()) for entry in other.values())
    assert largest > 0
    for number, entry in other.items():
        assert float((one[number]["exp_avg"] - entry["exp_avg"]).abs().max()) <= 1e-4 * largest, number


def without_measurements(content: Any) -> Any:
    """``content`` of a JSON file without ``MEASURED``."""
    if isinstance(content, dict):
        return {name: without_measurements(value) for name, value in content.items() if name not in MEASURED}
    return [without_measurements(value) for value in content] if isinstance(content, list) else content


def verdicts(folder: Path) -> dict[str, Any]:
    """Scores of a test, or shares of copies; results of attacks beside them."""
    found = {}
    for path in sorted(run_folder(folder).glob("*.json")):
        if path.name in ("scores.json", "memorisation.json", "attacks.json"):
            found[path.name] = without_measurements(json.loads(path.read_text(encoding="utf-8")))
    return found


def assert_same_scores(found: Any, expected: Any, rel: float = 1e-4) -> None:
    """Assert that ``verdicts`` of two runs are equal; losses among them are, to four digits or to ``rel``."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-6, nan_ok=True)
    elif isinstance(expected, (dict, list)):
        names = expected if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected)
        for name in names:
            assert_same_scores(found[name], expected[name], rel)
    else:
        assert found == expected


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """All pictures that commands have drawn below ``folder``, by their paths.

    Those of the unedited model are kept in a folder whose name says the device: it is left out.
    """
    paths = [path for path in sorted(folder.rglob("*.png")) if "checkpoints" not in path.parts]
    found = {}
    for path in paths:
        name = re.sub(r"(^|/)unedited/[0-9a-f]{16}/", r"\1unedited/", path.relative_to(folder).as_posix())
        assert name not in found
        found[name] = np.asarray(Image.open(path)).astype(int)
    return found


def assert_same_pictures(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that pictures are equal, up to one of 256 levels where rounding decided."""
    assert found.keys() == expected.keys() and len(found) > 0
    for name, picture in expected.items():
        assert picture.shape == found[name].shape and abs(picture - found[name]).max() <= 1, name


def exported(folder: Path) -> dict[str, Tensor]:
    """Weights of files of safetensors below ``folder``, by path and name; names of caches depend on the device."""
    caches = {"anchors", "references"}
    paths = [path for path in sorted(folder.rglob("*.safetensors")) if not caches & set(path.parts)]
    return {f"{path.relative_to(folder)}:{name}": value for path in paths for name, value in load_file(path).items()}
