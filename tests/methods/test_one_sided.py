"""NegGrad and naive deletion are the training loss of one side, up or down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.testing import assert_close

from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.methods.one_sided import NaiveDeletion, NegGrad

Build = Callable[..., DataUnlearning]
TakeStep = Callable[..., Any]


@pytest.mark.parametrize(
    ("kind", "arguments", "side", "factor"),
    [(NegGrad, {"superfactor": 3.0}, "forget", -3.0), (NaiveDeletion, {}, "keep", 1.0)],
)
def test_a_step_is_the_gradient_of_one_side(
    unlearner: Build, take_step: TakeStep, kind: type, arguments: dict[str, Any], side: str, factor: float
) -> None:
    step = take_step(unlearner(kind, **arguments))
    (pairs,) = step.pairs
    gamma, sigma = step.levels(pairs)
    noise, latents = pairs.noise.double(), getattr(pairs, side).double()
    states = getattr(pairs, f"{side}_condition").states
    prediction = step.predict(gamma * latents + sigma * noise, pairs, states)
    expected = step.gradient(factor * (prediction - noise).square().sum() / 4).double()
    # The update is a difference of weights in float32.
    assert_close(step.update.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    cost = step.module.current_cost()
    assert (cost["unet_forwards"], cost["unet_backwards"]) == (4, 4)


def test_the_superfactor_must_be_positive(unlearner: Build) -> None:
    with pytest.raises(ValueError, match=r"model\.superfactor=0 must be positive"):
        unlearner(NegGrad, superfactor=0)
