"""Keys and outputs of retained prompts, and the drift of the outputs."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from helpers import LAYERS, normal, started
from lit_unlearn.diffusion.prompts import encode_prompts, tokenize
from lit_unlearn.methods.shared.processes import Processes
from lit_unlearn.methods.shared.retained_texts import drift, encoder_outputs
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]


def test_the_retained_moment_is_that_of_the_retained_prompts(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(), fit)
    assert module.retain_prompts == ["a cat", "the cat in the rain"]
    ids = tokenize(module.pipeline.tokenizer, module.retain_prompts)
    assert list(module.retained) == LAYERS
    for name, retained in module.retained.items():
        keys = module.paired.keys(name, ids).flatten(0, 1).double()
        assert retained.count == len(keys) == 64
        assert retained.moment is not None
        # A sum of 64 products in float64.
        assert_close(retained.moment, keys.mT @ keys, rtol=1e-12, atol=1e-12)
        assert retained.largest_norm == pytest.approx(float(keys.norm(dim=1).max()), rel=1e-12)


def test_the_outputs_are_those_that_the_unet_reads(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(), fit)
    with torch.no_grad():
        states = encode_prompts(module.pipeline.tokenizer, module.text_encoder, module.retain_prompts)
        (outputs,) = encoder_outputs(module)
    assert torch.equal(outputs, states) and torch.equal(module.unmoved[0], states)


def test_the_drift_is_a_ratio_of_norms() -> None:
    before, now = ([normal(2, 3, seed=seed).float(), normal(4, seed=seed + 1).float()] for seed in (1, 3))
    old, new = (torch.cat([part.flatten() for part in parts]) for parts in (before, now))
    module = L.LightningModule()
    assert drift(before, now, Processes(module)) == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-6)
    assert drift(before, before, Processes(module)) == 0
