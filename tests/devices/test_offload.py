"""With ``offload``, a part is on the device while it is used, and the results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from devices.accelerator import ON_DEVICE
from devices.recipes import Stock, small
from devices.runs import weights
from devices.workers import Workers


def assert_in_their_places(found: list[dict[str, Any]]) -> None:
    """Assert that a part on the device is wanted or held, and all others are in the processor's memory."""
    for moment in found:
        there = {name for name, place in moment["places"].items() if place == "pretend"}
        assert set(moment["wanted"]) <= there <= {*moment["wanted"], *moment["held"]}
        assert {moment["places"][name] for name in moment["places"] if name not in there} <= {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["null_space", "null_space_refined", "null_space_context", "esd", "uce"])
def test_a_fit_has_only_what_it_uses_on_the_device(name: str, workers: Workers, stock: Stock, tmp_path: Path) -> None:
    args = ["fit", *small(name, stock), "--trainer.callbacks=null", *ON_DEVICE]
    found = workers["float64"].call(
        tmp_path / "offload", "devices.examples:places_of", args=[*args, "--model.init_args.offload=true"]
    )
    wanted = {part for moment in found for part in moment["wanted"]}
    assert {"text_encoder", "unet"} & wanted
    assert_in_their_places(found)
    assert workers["float64"].run(tmp_path / "resident", args).value == [0]
    offloaded, resident = weights(tmp_path / "offload"), weights(tmp_path / "resident")
    assert offloaded.keys() == resident.keys() and len(resident) > 0
    assert all(offloaded[key].equal(value) for key, value in resident.items())


@pytest.mark.slow
def test_pictures_are_drawn_by_one_part_after_the_other(workers: Workers, stock: Stock, tmp_path: Path) -> None:
    args = ["generate", "a dog", "-o", "dog.png", f"--model={stock.model}", "--num_inference_steps=2"]
    args += ["--device=pretend"]
    found = workers["no_float64"].call(tmp_path / "offload", "devices.examples:places_of", args=[*args, "--offload"])
    order = list(dict.fromkeys(part for moment in found for part in moment["wanted"]))
    assert order == ["text_encoder", "unet", "vae"]
    assert_in_their_places(found)
    assert all(not moment["held"] for moment in found)
    assert workers["no_float64"].run(tmp_path / "resident", args[:-1]).value == [0]
    assert (tmp_path / "offload" / "dog.png").read_bytes() == (tmp_path / "resident" / "dog.png").read_bytes()
