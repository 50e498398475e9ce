"""Which moments are held at once, and their sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.methods.shared import moments
from lit_unlearn.methods.shared.moments import MomentSums, holding
from lit_unlearn.methods.shared.processes import Processes

WIDTHS = {"a": 10, "b": 20, "c": 20, "d": 10}
SIZES = [16 * width**2 for width in WIDTHS.values()]
COUNTS = {"a": 3, "b": 30, "c": 5, "d": 30}


@pytest.mark.parametrize(
    ("bound", "groups", "thin"),
    [
        (sum(SIZES), [4], ""),  # all fit
        (sum(SIZES) - 1, [4], "ac"),  # with the keys of those that have few, all fit
        (16 * (30 + 400 + 100), [3, 1], "ac"),
        (16 * 400, [1, 1, 2], "ac"),
        (1, [1, 1, 1, 1], "ac"),  # a single layer may take more
    ],
)
def test_what_is_held_at_once(bound: int, groups: list[int], thin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST_HELD_BYTES", bound)
    found = holding(WIDTHS, COUNTS)
    assert [len(group) for group in found.groups] == groups
    assert [name for group in found.groups for name in group] == list(WIDTHS)
    assert found.thin == frozenset(thin)
    expected = [16 * (COUNTS[name] if name in thin else width) * width for name, width in WIDTHS.items()]
    assert list(found.sizes.values()) == expected
    assert found.most <= max(bound, *expected)


def test_the_t5_of_flux_is_taken_two_layers_at_a_time_and_that_of_pixart_at_once() -> None:
    widths = {str(number): 10240 for number in range(24)}
    flux = holding(widths, dict.fromkeys(widths, 100 * 512))
    assert {len(group) for group in flux.groups} == {2} and not flux.thin and flux.most < moments.MOST_HELD_BYTES
    pixart = holding(widths, dict.fromkeys(widths, 100 * 8))
    assert len(pixart.groups) == 1 and pixart.thin == set(widths) and pixart.most == 24 * 2 * 8 * 800 * 10240


@pytest.mark.parametrize("rows_bytes", [2**28, 8 * 10 * 4])
def test_sums_of_batches(rows_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS_BYTES", rows_bytes)
    layers = {name: nn.Linear(width, 3) for name, width in WIDTHS.items()}
    batches = [{name: torch.randn(11, width) for name, width in WIDTHS.items()} for _ in range(3)]
    sums = MomentSums(layers, {"a", "c"})
    for batch in batches:
        for name, keys in batch.items():
            sums.add(name, keys)
    alone: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=1), _trainer=None)
    retained = sums.retained(Processes(alone), 7)
    assert not sums.sums and not sums.rows
    for name, own in retained.items():
        keys = torch.cat([batch[name] for batch in batches]).double()
        assert own.count == 33 and own.prompts == 7 and own.keys is None
        assert own.largest_norm == pytest.approx(float(keys.norm(dim=1).max()), rel=1e-12)
        moment = own.moment
        if name in "ac":
            assert isinstance(moment, ThinMoment) and torch.equal(moment.rows, keys)
        else:
            assert isinstance(moment, Tensor)
            assert_close(moment, keys.mT @ keys, rtol=0, atol=1e-11)
