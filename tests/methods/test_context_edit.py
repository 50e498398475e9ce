"""The direct edit of the maps that read text first: its keys, what is retained, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from helpers import KV, PROMPTS, TARGETS, by_null_space, states
from lit_unlearn.diffusion import base_model
from lit_unlearn.methods.context_edit import ContextEdit

Build = Callable[..., ContextEdit]
Fit = Callable[..., L.Trainer]
KEPT = ["a cat", "the cat in the rain"]
ALIGNED = [3, *range(4, 32), 31]
"""Target position of each position from 2 on: "dog" takes "ball", its target's last token, and all behind it shifts."""


@pytest.fixture
def context(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``ContextEdit`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> ContextEdit:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        return ContextEdit(**{**defaults, "edited_parameters": "xattn-kv", **arguments})

    return build


@pytest.mark.parametrize("retain_empty", [True, False])
def test_it_is_the_papers_formula_with_the_outputs_of_the_target_prompts(
    retain_empty: bool, context: Build, fit: Fit
) -> None:
    module = context(retain_empty=retain_empty)
    fit(module, by_null_space(threshold=16, rule="count", ridge=0.5))
    # All positions but the first, BOS. "the dog at sunset" has its concept at 2 as well.
    keys = states(module, *PROMPTS).double()[:, 1:].flatten(0, 1)
    goals = states(module, *TARGETS).double()[:, [1, *ALIGNED]].flatten(0, 1)
    kept, empty = states(module, *KEPT).double().flatten(0, 1), states(module, "").double()[0]
    moment = kept.mT @ kept + (len(KEPT) * empty.mT @ empty if retain_empty else 0)
    free = torch.linalg.eigh(moment).eigenvectors[:, :16]
    projector = free @ free.mT
    for name in KV:
        weight = module.pretrained.values[name].double()
        residual = (goals @ weight.mT - keys @ weight.mT).mT
        system = keys.mT @ keys @ projector + 0.5 * torch.eye(32, dtype=torch.float64)
        expected = residual @ keys @ projector @ torch.linalg.inv(system)
        assert expected.norm() > 1e-2 * weight.norm()
        # Weights are stored in float32.
        assert_close(module.layers[name].weight.double() - weight, expected, rtol=0, atol=1e-6)
        assert module.retained[name].count == len(kept) + (len(KEPT) * 32 if retain_empty else 0)
    assert module.report["edited_states"] == {"tokens": 2 * 31}


def test_only_the_last_token(context: Build, fit: Fit) -> None:
    module = context(tokens="last_subject")
    fit(module, by_null_space(threshold=16, rule="count"))
    found, goals = states(module, *PROMPTS).double(), states(module, *TARGETS).double()
    pairs = module.on_way["tokens"]
    assert torch.equal(pairs.keys, torch.stack([found[0, 2], found[1, 4]]))
    assert torch.equal(pairs.goals, torch.stack([goals[0, 3], goals[1, 5]]))


def test_states_before_the_concept_do_not_carry_it(context: Build, fit: Fit) -> None:
    module = context()
    fit(module, by_null_space(threshold=16, rule="count"))
    carrying = module.on_way["tokens"].carrying.view(2, 31)
    assert carrying.tolist() == [[False, *[True] * 30]] * 2  # "a" and "the" come before the dog


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edited_parameters": "selfattn"}, "edits only the maps that read text first"),
        ({"retain": ["a dog on grass"]}, r"model\.retain.* names the edited concept"),
        ({"concept": ["dog", "cat"]}, "leaves no prompt of pets to retain"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: dict[str, Any], message: str, context: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        context(**arguments)
