"""SISS and its kin against their formulas written out as in the paper, with weights that are exponentiated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.methods.siss import SISS, Bernoulli, TwoPass

Build = Callable[..., SISS | TwoPass | Bernoulli]
TakeStep = Callable[..., Any]

NOISY = {"min_timestep": 800}
"""Timesteps at which ``tiny_sd``'s latents overlap, so that weights are neither 0 nor 1."""


def close(update: Tensor, expected: Tensor) -> None:
    """The update is the weights' difference in float32, the expected gradient is summed in another order."""
    assert_close(update.double(), expected.double(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def naive_losses(step: Any, mixture: float) -> tuple[Tensor, Tensor, Tensor]:
    """The two weighted losses (B,) and ``w_x`` (B,), as the paper writes them."""
    (pairs,) = step.pairs
    gamma, sigma = step.levels(pairs)
    chosen = pairs.from_forget.view(-1, 1, 1, 1)
    x, a = pairs.keep.double(), pairs.forget.double()
    m = gamma * torch.where(chosen, a, x) + sigma * pairs.noise.double()
    states = torch.where(pairs.from_forget.view(-1, 1, 1), pairs.forget_condition.states, pairs.keep_condition.states)
    ratio = ((m - gamma * x).square() - (m - gamma * a).square()) / (2 * sigma**2)
    ratio = ratio.sum(dim=(1, 2, 3)).exp()
    weight_x, weight_a = 1 / ((1 - mixture) + mixture * ratio), 1 / ((1 - mixture) / ratio + mixture)
    prediction = step.predict(m, pairs, states)
    loss_x = weight_x * (prediction - (m - gamma * x) / sigma).square().sum(dim=(1, 2, 3))
    loss_a = weight_a * (prediction - (m - gamma * a) / sigma).square().sum(dim=(1, 2, 3))
    return loss_x, loss_a, weight_x


def two_pass_losses(step: Any) -> tuple[Tensor, Tensor]:
    (pairs,) = step.pairs
    gamma, sigma = step.levels(pairs)
    noise = pairs.noise.double()
    losses = []
    for latents, states in (
        (pairs.keep, pairs.keep_condition.states),
        (pairs.forget, pairs.forget_condition.states),
    ):
        prediction = step.predict(gamma * latents.double() + sigma * noise, pairs, states)
        losses.append((prediction - noise).square().sum(dim=(1, 2, 3)))
    return losses[0], losses[1]


@pytest.mark.parametrize("combination", ["fraction", "norm"])
def test_siss_descends_as_the_paper_says(unlearner: Build, take_step: TakeStep, combination: str) -> None:
    scaling = {"fraction": 0.1, "norm": 5.0}[combination]
    step = take_step(unlearner(SISS, combination=combination, scaling=scaling, mixture=0.4, **NOISY))
    loss_x, loss_a, weight = naive_losses(step, 0.4)
    assert ((weight > 1e-3) & (weight < 1 / 0.6 - 1e-3)).any()
    assert 0 < step.pairs[0].from_forget.sum() < 4
    g_x, g_a = step.gradient(loss_x.sum() / 4), step.gradient(loss_a.sum() / 4)
    wanted = 0.1 * g_x.norm() if combination == "fraction" else 5.0
    close(step.update, g_x - wanted / g_a.norm() * g_a)
    assert float((step.update - g_x).norm() / wanted) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("kind", [SISS, TwoPass])
def test_the_formula_weighs_the_losses_by_n_and_k(unlearner: Build, take_step: TakeStep, kind: type) -> None:
    module = unlearner(kind, combination="formula", **NOISY)
    assert module.draws_from_all
    step = take_step(module)
    # Two to keep and one to forget have the same caption.
    assert torch.equal(step.pairs[0].n, torch.full((4,), 3.0))
    loss_x, loss_a = naive_losses(step, 0.5)[:2] if kind is SISS else two_pass_losses(step)
    close(step.update, step.gradient((3 / 2 * loss_x - 1 / 2 * loss_a).sum() / 4))


def test_two_passes_share_noise_and_timestep(unlearner: Build, take_step: TakeStep) -> None:
    step = take_step(unlearner(TwoPass, combination="norm", scaling=3.0))
    loss_x, loss_a = two_pass_losses(step)
    g_x, g_a = step.gradient(loss_x.sum() / 4), step.gradient(loss_a.sum() / 4)
    assert g_a.norm() > 0
    close(step.update, g_x - 3.0 / g_a.norm() * g_a)


def test_bernoulli_counts_each_pair_for_one_side(unlearner: Build, take_step: TakeStep) -> None:
    step = take_step(unlearner(Bernoulli, combination="formula", mixture=0.25), batch_size=8)
    chosen = step.pairs[0].from_forget
    assert 0 < chosen.sum() < 8
    loss_x, loss_a = two_pass_losses(step)
    loss = (3 / 2 * loss_x[~chosen].sum() / 0.75 - 1 / 2 * loss_a[chosen].sum() / 0.25) / 8
    close(step.update, step.gradient(loss))


def test_siss_of_two_captions_is_bernoulli(unlearner: Build, take_step: TakeStep) -> None:
    steps = [take_step(unlearner(kind, **NOISY), pairing="any", batch_size=6) for kind in (SISS, Bernoulli)]
    same = steps[0].pairs[0].same_caption
    assert not same.all()
    assert torch.equal(steps[0].pairs[0].noise, steps[1].pairs[0].noise)
    weighted = []
    for step in steps:
        with step.module.pretrained.restored(), torch.no_grad():
            weighted.append(torch.stack(list(step.module.losses(step.pairs[0])))[:, ~same])
    assert_close(weighted[0], weighted[1], rtol=1e-5, atol=0)
    assert (weighted[0] == 0).any() and (weighted[0] > 0).any()


@pytest.mark.parametrize("mixture", [0.0, 1.0])
def test_at_the_ends_of_the_mixture_one_side_is_the_two_pass_loss(
    unlearner: Build, take_step: TakeStep, mixture: float
) -> None:
    step = take_step(unlearner(SISS, mixture=mixture, combination="norm", scaling=2.0, **NOISY))
    chosen = step.pairs[0].from_forget
    assert chosen.all() if mixture else not chosen.any()
    loss_x, loss_a, weight = naive_losses(step, mixture)
    plain = two_pass_losses(step)
    assert_close((loss_x, loss_a)[int(mixture)], plain[int(mixture)])
    assert torch.equal(weight, torch.ones_like(weight)) is (mixture == 0)
    g_x, g_a = step.gradient(loss_x.sum() / 4), step.gradient(loss_a.sum() / 4)
    close(step.update, g_x - 2.0 / g_a.norm() * g_a)


def test_far_apart_pictures_do_not_overflow(unlearner: Build, take_step: TakeStep) -> None:
    step = take_step(unlearner(SISS, min_timestep=0, max_timestep=1))
    (pairs,) = step.pairs
    pairs.keep = 100 * pairs.keep
    loss_x, loss_a = step.module.losses(pairs)
    assert loss_x.isfinite().all() and loss_a.isfinite().all()
    # Where they do not overlap the weights are 2 and 0.
    assert torch.equal(loss_x == 0, pairs.from_forget)
    assert torch.equal(loss_a == 0, ~pairs.from_forget)


def test_velocity_prediction_descends_the_models_own_loss(
    tiny_sd2: Path, unlearner: Build, take_step: TakeStep
) -> None:
    step = take_step(unlearner(SISS, model=str(tiny_sd2), combination="norm", scaling=2.0, **NOISY))
    (pairs,) = step.pairs
    gamma, sigma = step.levels(pairs)
    x, a, noise = pairs.keep.double(), pairs.forget.double(), pairs.noise.double()
    m = gamma * torch.where(pairs.from_forget.view(-1, 1, 1, 1), a, x) + sigma * noise
    eps_x, eps_a = (m - gamma * x) / sigma, (m - gamma * a) / sigma
    ratio = ((eps_x.square() - eps_a.square()).sum(dim=(1, 2, 3)) / 2).exp()
    assert ratio.min() < 1 < ratio.max()  # both sides are weighed
    velocity = step.predict(m, pairs, pairs.keep_condition.states)
    loss_x = 2 / (1 + ratio) * (velocity - (gamma * eps_x - sigma * x)).square().sum(dim=(1, 2, 3))
    loss_a = 2 / (1 / ratio + 1) * (velocity - (gamma * eps_a - sigma * a)).square().sum(dim=(1, 2, 3))
    g_x, g_a = step.gradient(loss_x.sum() / 4), step.gradient(loss_a.sum() / 4)
    close(step.update, g_x - 2.0 / g_a.norm() * g_a)


@pytest.mark.parametrize(("kind", "backwards"), [(SISS, 2), (Bernoulli, 2), (TwoPass, 2)])
def test_what_a_step_costs(unlearner: Build, take_step: TakeStep, kind: type, backwards: int) -> None:
    forwards = 2 if kind is TwoPass else 1
    cost = take_step(unlearner(kind)).module.current_cost()
    assert (cost["unet_forwards"], cost["unet_backwards"]) == (4 * forwards, 4 * backwards)
    # The formula needs no norms, so the two losses of one forward share their backward.
    cost = take_step(unlearner(kind, combination="formula")).module.current_cost()
    assert cost["unet_backwards"] == 4 * (2 if kind is TwoPass else 1)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SISS, {"mixture": 1.5}, r"model\.mixture=1\.5 must lie between 0 and 1"),
        (SISS, {"scaling": 0.0}, r"model\.scaling=0\.0 must be positive"),
        (TwoPass, {"scaling": -1.0}, r"model\.scaling=-1\.0 must be positive"),
        (Bernoulli, {"mixture": 0.0}, r"model\.mixture=0 never shows the model one of the sides"),
        (Bernoulli, {"mixture": 1.0}, r"model\.mixture=1 never shows the model one of the sides"),
    ],
)
def test_wrong_values(unlearner: Build, kind: type[SISS | Bernoulli], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unlearner(kind, **arguments)


def test_the_ends_of_the_mixture_need_one_caption(unlearner: Build, take_step: TakeStep) -> None:
    with pytest.raises(ValueError, match=r"model\.mixture=1 needs pairs with one caption"):
        take_step(unlearner(SISS, mixture=1.0), pairing="any")
