"""Half precision on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from devices.recipes import Stock, small
from devices.runs import weights
from devices.workers import Workers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
@pytest.mark.parametrize("name", ["esd", "null_space", "null_space_refined", "uce"])
def test_true_half_precision(
    name: str, precision: str, dtype: torch.dtype, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    folders = []
    for kind in ("cpu", "no_float64"):
        folders.append(tmp_path / kind)
        workers[kind].succeed(tmp_path / kind, ["fit", *small(name, stock, **{"trainer.precision": precision})])
    expected, found = map(weights, folders)
    assert expected.keys() == found.keys() and len(found) > 0
    for weight, value in expected.items():
        assert found[weight].dtype == value.dtype and found[weight].isfinite().all()
        # One digit of the type is what a sum in another order may change.
        limit = 4 * torch.finfo(dtype).eps * max(1.0, float(value.abs().max()))
        assert float((found[weight].float() - value.float()).abs().max()) <= limit, weight
