"""EraseDiff against its formula written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.methods.erase_diff import EraseDiff

Build = Callable[..., EraseDiff]
TakeStep = Callable[..., Any]


def gradients(step: Any, velocity: bool = False) -> tuple[Tensor, Tensor]:
    """``g_x`` and ``g_a`` of the copy, float64 losses."""
    (pairs,) = step.pairs
    gamma, sigma = step.levels(pairs)
    x, a, noise = pairs.keep.double(), pairs.forget.double(), pairs.noise.double()
    noisy_x, noisy_a = gamma * x + sigma * noise, gamma * a + sigma * noise
    output = step.predict(noisy_x, pairs, pairs.keep_condition.states)
    loss_x = (output - (gamma * noise - sigma * x if velocity else noise)).square().sum() / 4
    output = step.predict(noisy_a, pairs, pairs.forget_condition.states)
    prediction = gamma * output + sigma * noisy_a if velocity else output
    loss_a = (prediction - pairs.uniform.double()).square().sum() / 4
    return step.gradient(loss_x).double(), step.gradient(loss_a).double()


@pytest.mark.parametrize("eta", [1e-2, 10.0])
def test_it_adds_as_much_of_the_forget_gradient_as_eta_asks_for(
    unlearner: Build, take_step: TakeStep, eta: float
) -> None:
    step = take_step(unlearner(EraseDiff, eta=eta))
    g_x, g_a = gradients(step)
    scale = max(eta - float(g_x @ g_a / (g_a @ g_a)), 0)
    assert (scale > 0) is (eta == 10.0)
    expected = g_x + scale * g_a
    # The update is a difference of weights in float32.
    assert_close(step.update.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_what_is_forgotten_is_to_be_uniform_noise(unlearner: Build, take_step: TakeStep) -> None:
    (pairs,) = take_step(unlearner(EraseDiff)).pairs
    assert pairs.uniform.min() >= 0
    assert pairs.uniform.max() < 1
    assert float(pairs.uniform.mean()) == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(pairs.uniform[0], pairs.uniform[1])


def test_a_velocity_stands_for_its_noise(tiny_sd2: Path, unlearner: Build, take_step: TakeStep) -> None:
    step = take_step(unlearner(EraseDiff, model=str(tiny_sd2), eta=10.0))
    g_x, g_a = gradients(step, velocity=True)
    expected = g_x + max(10.0 - float(g_x @ g_a / (g_a @ g_a)), 0) * g_a
    assert_close(step.update.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_eta_must_be_positive(unlearner: Build) -> None:
    with pytest.raises(ValueError, match=r"model\.eta=0 must be positive"):
        unlearner(EraseDiff, eta=0)
