"""What lies in a GPU's memory, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.accelerator import ON_DEVICE
from devices.recipes import Stock, small
from devices.workers import Workers


def test_a_model_is_loaded_part_by_part(workers: Workers, stock: Stock, tmp_path: Path) -> None:
    found = workers["no_float64"].call(
        tmp_path, "devices.examples:left_behind", model=str(stock.model), device="pretend:0"
    )
    assert [part for part, _, _ in found] == ["text_encoder", "unet", "vae"]
    for part, held, place in found:
        assert held == 0, f"{held} storages of earlier parts are held while {part} is loaded"
        assert place == "pretend"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["null_space", "least_squares", "memit"])
def test_a_closed_form_keeps_nothing_longer_than_a_layer(
    name: str, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    found = {}
    for layers, given in {1: {"model__first_layer": 2}, 2: {"model__first_layer": 1}}.items():
        args = ["fit", *small(name, stock, **given), *ON_DEVICE]
        found[layers] = workers["float64"].call(tmp_path / str(layers), "devices.examples:float64_of_a_fit", args=args)
    assert len(found[2]["between"]) >= len(found[1]["between"]) > 0  # MEMIT's layers are solved for after all steps
    assert found[1]["peak"] > 128 * 128 * 8  # the moment of a layer's 128 inputs: it does solve there
    # All layers are of one size, but for the dimension of their null spaces: two need no more at once than one.
    assert found[2]["peak"] <= 1.1 * found[1]["peak"]
    assert set(found[2]["between"]) == {found[2]["after"]} == {0}
