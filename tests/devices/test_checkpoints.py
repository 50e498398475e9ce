"""A checkpoint that a GPU's process wrote is read without one, and the other way round."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from devices.conftest import Finished
from devices.recipes import Stock, small
from devices.runs import assert_close, run_folder, state, weights
from devices.workers import Workers
from lit_unlearn.cli import TOLD_TO_STOP
from lit_unlearn.edits.checkpoint import load_checkpoint

RECIPES = [
    "esd",
    pytest.param("null_space_refined", marks=pytest.mark.slow),
    pytest.param("siss", marks=pytest.mark.slow),
]


def location_tags(path: Path) -> bytes:
    """The pickle of a checkpoint, in which the place of every storage stands."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


@pytest.mark.parametrize(("first", "second"), [("no_float64", "cpu"), ("cpu", "no_float64")])
@pytest.mark.parametrize("name", RECIPES)
def test_a_fit_goes_on_elsewhere(
    name: str, first: str, second: str, finished: Finished, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    (whole,) = finished(name, second)
    fit = ["fit", *small(name, stock)]
    answer = workers[first].run(tmp_path, fit, stop_at=0)
    assert answer.value == [TOLD_TO_STOP], answer
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    assert (b"pretend:0" in location_tags(last)) == (first != "cpu")
    halfway = load_checkpoint(last)
    assert halfway["global_step"] == 1 and halfway["optimizer_states"][0]["state"]
    assert "which was interrupted" in workers[second].succeed(tmp_path, fit)
    assert_close(weights(tmp_path), weights(whole), halfway["state_dict"])
    assert state(tmp_path)["global_step"] == state(whole)["global_step"]


def tagged(source: Path, target: Path, place: str) -> None:
    """Write the checkpoint ``source`` again, as a process with its tensors on ``place`` writes it."""
    content = torch.load(source, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: place)
        torch.save(content, target)


@pytest.mark.parametrize("place", ["cuda:0", "cuda:3", "mps"])
def test_a_checkpoint_of_a_gpu_is_read_without_one(place: str, finished: Finished, tmp_path: Path) -> None:
    (whole,) = finished("uce", "cpu")
    source = run_folder(whole) / "checkpoints" / "last.ckpt"
    tagged(source, tmp_path / "last.ckpt", place)
    assert place.encode() in location_tags(tmp_path / "last.ckpt")
    if not torch.cuda.is_available() and place != "mps":
        with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
            torch.load(tmp_path / "last.ckpt", weights_only=True)
    found, expected = load_checkpoint(tmp_path / "last.ckpt")["state_dict"], load_checkpoint(source)["state_dict"]
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(value.device.type == "cpu" and torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "no_float64"])
def test_a_fit_goes_on_from_a_checkpoint_of_a_gpu(
    kind: str, finished: Finished, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    (whole,) = finished("esd", kind)
    fit = ["fit", *small("esd", stock)]
    assert workers["cpu"].run(tmp_path, fit, stop_at=0).value == [TOLD_TO_STOP]
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    tagged(last, tmp_path / "tagged.ckpt", "cuda:0")
    shutil.move(tmp_path / "tagged.ckpt", last)
    halfway = load_checkpoint(last)["state_dict"]
    workers[kind].succeed(tmp_path, [*fit, "--ckpt_path", last])
    assert_close(weights(tmp_path), weights(whole), halfway)
