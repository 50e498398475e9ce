"""One layer's keys: which of them are edited, what is written for them, and what is kept between rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.solvers import Retained
from lit_unlearn.methods.shared import layer_state
from lit_unlearn.methods.shared.layer_state import KeptKeys, LayerInputs, LayerState


def state_of(mask: list[list[bool]], **arguments: int) -> LayerState:
    """A layer of 5 inputs and 3 outputs at two prompts of two positions."""
    layer = nn.Linear(5, 3)
    keys = normal(2, 2, 5).float()
    return LayerState("a.weight", layer, keys, torch.tensor(mask), **arguments)


def test_a_write_has_the_edited_positions_as_often_as_they_count() -> None:
    state = state_of([[True, False], [True, True]], weight=2)
    values, retained = normal(2, 2, 3, seed=1).float(), Retained(torch.eye(5), 4)
    write = state.write(values, retained, torch.tensor([True] * 6))
    places = [(0, 0), (0, 0), (1, 0), (1, 0), (1, 1), (1, 1)]
    assert torch.equal(write.keys, torch.stack([state.keys[place] for place in places]))
    assert torch.equal(write.values, torch.stack([values[place] for place in places]))
    assert torch.equal(write.weight, state.layer.weight.detach().double()) and write.dtype == torch.float32
    assert write.retained is retained and not write.shared
    with torch.no_grad():
        state.layer.weight.zero_()
    assert write.weight.abs().min() > 0  # its own copy


def test_a_layer_s_output_is_computed_in_float32_and_without_gradients_when_it_is_asked_for() -> None:
    state = state_of([[True, True]] * 2)
    assert "initial" not in vars(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = state.initial
    assert torch.equal(found, state.keys @ state.layer.weight.mT) and not found.requires_grad


def test_without_values_a_write_has_the_anchors_and_their_weight() -> None:
    state = state_of([[True, True]] * 2)
    state.anchors, state.anchor_weight = normal(4, 5, seed=2).float(), normal(3, 5, seed=3).float()
    write = state.write(None, Retained(), None)
    assert write.values is None and write.anchors is state.anchors
    assert_close(write.wanted(), state.anchors.double() @ state.anchor_weight.double().mT)


def test_rows_of_kept_keys_are_one_tensor_in_all_rounds() -> None:
    kept, ids = KeptKeys(), torch.zeros(2, 2)
    everywhere, somewhere = [[True, True]] * 2, [[True, False]] * 2
    states = [state_of(everywhere), state_of(everywhere), state_of(somewhere), state_of(everywhere, weight=2)]
    for state in states:
        state.keys = kept.of("a.weight", ids, lambda _, own=state: LayerInputs(own.keys)).keys
        kept.share_rows(state)
    assert states[0].rows is not None and states[0].rows is states[1].rows
    assert states[0].write(states[0].initial, Retained(), None).shared
    assert states[2].rows is None and states[3].rows is None
    alone = state_of(everywhere)
    kept.share_rows(alone)
    assert alone.rows is None


def test_keys_beyond_the_bound_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compute(ids: Tensor) -> LayerInputs:
        made.append(len(ids))
        return LayerInputs(ids.float(), stream=ids.float())

    kept, ids, other = KeptKeys(), torch.ones(2, 4), torch.ones(3, 4)
    monkeypatch.setattr(layer_state, "MOST_KEPT_BYTES", ids.float().nbytes)
    for _ in range(2):
        kept.of("a", ids, compute)
        kept.of("a", other, compute)
    assert made == [2, 3, 3]
