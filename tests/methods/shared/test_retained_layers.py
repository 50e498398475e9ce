"""Retained keys of text layers that are not all held at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.testing import assert_close

from helpers import LAYERS, by_least_squares, by_null_space, weights
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.shared import moments, retained_layers
from lit_unlearn.methods.shared.retained_layers import RetainedLayers
from lit_unlearn.methods.value_refinement import ValueRefinement

Build = Callable[..., Any]


class Watched:
    """What is gathered during a fit: how often, and the most layers whose keys or null spaces are held at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: WeakSet[Retained] = WeakSet()
        self.passes: list[list[str]] = []
        self.most = 0
        gather = RetainedLayers.of

        def of(layers: RetainedLayers, name: str) -> dict[str, Retained]:
            assert not self.alive  # the group before is released first
            found = gather(layers, name)
            self.passes.append(list(found))
            self.alive.update(found.values())
            self.most = max(self.most, len(self.alive))
            return found

        monkeypatch.setattr(RetainedLayers, "of", of)


@pytest.mark.parametrize(
    "edit",
    [
        partial(by_null_space, ridge=0.1),
        partial(by_null_space, rule="soft", ridge=None, threshold=0.1),
        partial(by_least_squares, ridge=1.0),
    ],
)
@pytest.mark.parametrize("kind", [ValueRefinement, MEMIT])
def test_groups_give_the_same_edit(
    kind: type[ValueRefinement],
    edit: Build,
    refinement: Build,
    fit: Build,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = {"values": "residual", "rounds": 2, "retain_empty": True}
    whole = refinement(kind, **arguments)
    epochs = 4 if kind is ValueRefinement else 2  # two rounds of two layers, or of one stretch
    fit(whole, edit(), steps=1, max_epochs=epochs)
    assert len(whole.retained) == len(LAYERS)

    monkeypatch.setattr(moments, "MOST_HELD_BYTES", 1)
    watched = Watched(monkeypatch)
    single = refinement(kind, **arguments)
    with caplog.at_level(logging.INFO):
        fit(single, edit(), steps=1, max_epochs=epochs)
    assert watched.passes == [[name] for name in 2 * LAYERS] and watched.most == 1
    assert "layers are taken in 2 groups, which takes 2 passes over the retained prompts in each round" in caplog.text
    found, expected = weights(single), weights(whole)
    for name in LAYERS:
        assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert single.report.get("spectrum", {}).keys() == whole.report.get("spectrum", {}).keys()
    for name, layer in whole.report["layers"].items():
        for entry, value in layer.items():
            assert single.report["layers"][name][entry] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, entry)
    drift = whole.report["retained_state_drift"]
    assert single.report["retained_state_drift"] == pytest.approx(drift, rel=1e-3)


def test_few_keys_are_kept_instead_of_moments(refinement: Build, fit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One retained prompt, whose positions are fewer than a layer's inputs; a bound that their keys fit in."""
    made = partial(refinement, values="target", retain_empty=True)
    whole = made()
    whole.retain_prompts = whole.retain_prompts[:1]
    fit(whole, by_null_space(ridge=0.1), steps=1, max_epochs=2)
    sizes = [own.moment.nbytes for own in whole.retained.values()]
    held = [
        2 * 8 * layer.in_features * own.count
        for layer, own in zip(whole.layers.values(), whole.retained.values(), strict=True)
    ]
    assert sum(held) < 2 * sum(sizes)  # otherwise the test says nothing
    monkeypatch.setattr(moments, "MOST_HELD_BYTES", 2 * sum(sizes) - 1)
    thin = made()
    thin.retain_prompts = whole.retain_prompts
    edit = by_null_space(ridge=0.1)
    fit(thin, edit, steps=1, max_epochs=2)
    assert len(thin.retained) == len(LAYERS) and all(
        isinstance(own.moment, ThinMoment) for own in thin.retained.values()
    )
    assert isinstance(edit.solver, NullSpace)
    assert {type(space).__name__ for space in edit.solver.null_spaces.values()} == {"ThinNullSpace"}
    for name in LAYERS:
        assert_close(thin.retained[name].moment.dense, whole.retained[name].moment, rtol=1e-12, atol=1e-12)
        assert thin.retained[name].count == whole.retained[name].count
        assert thin.retained[name].largest_norm == whole.retained[name].largest_norm
        assert_close(weights(thin)[name], weights(whole)[name], rtol=1e-5, atol=1e-6)


def test_inputs_of_one_layer_at_a_time(refinement: Build, fit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    read = retained_layers.read_inputs

    def recording(*args: Any) -> Any:
        *first, take = args

        def record(name: str, keys: torch.Tensor) -> None:
            taken.append(name)
            take(name, keys)

        return read(*first, record)

    monkeypatch.setattr(retained_layers, "read_inputs", recording)
    fit(refinement(values="target", retain_empty=True), by_null_space(), steps=1)
    assert taken == [*LAYERS, *LAYERS]  # one batch of prompts and the empty prompt, each layer once
