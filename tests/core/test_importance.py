"""Importance weights against densities written out, expectations by enumeration and quadrature, gradient rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from lit_unlearn.core.importance import (
    choose_forget,
    deletion_coefficients,
    erase_diff_scale,
    global_norm,
    importance_weights,
    inner_product,
    log_density_ratio,
    mixture_noises,
    subtraction_scale,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""Rounding of sums of a few float64 numbers of size one."""


def pair(seed: int = 0, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (6, 4, 3, 3)
    keep, forget, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return keep, forget, noise


# --- the mixture


def test_each_item_has_a_coin_of_its_own() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for mixture in (0.25, 0.5, 0.9):
        chosen = choose_forget(uniform, mixture)
        assert chosen.dtype == torch.bool
        # Five standard deviations of a share of 20,000 coins.
        assert float(chosen.double().mean()) == pytest.approx(mixture, abs=5 * math.sqrt(0.25 / 20_000))
    assert not choose_forget(torch.zeros(3), 0.0).any()
    assert choose_forget(torch.full((3,), 1 - 2**-24), 1.0).all()


def test_both_noises_lead_to_the_same_m_and_the_chosen_one_is_exact() -> None:
    keep, forget, noise = pair()
    chosen = torch.tensor([True, False, True, False, False, True])
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    noise_keep, noise_forget = mixture_noises(keep, forget, noise, chosen, alpha, sigma)
    m = alpha * torch.where(chosen.view(-1, 1, 1, 1), forget, keep) + sigma * noise
    assert_close(alpha * keep + sigma * noise_keep, m, **EXACT)
    assert_close(alpha * forget + sigma * noise_forget, m, **EXACT)
    assert torch.equal(noise_keep[~chosen], noise[~chosen])
    assert torch.equal(noise_forget[chosen], noise[chosen])
    assert (noise_keep[chosen] - noise[chosen]).abs().max() > 0.1


def test_the_log_ratio_is_that_of_two_normal_densities() -> None:
    keep, forget, noise = pair()
    chosen = torch.tensor([True, False] * 3)
    alpha, sigma = 0.6, 0.8
    noise_keep, noise_forget = mixture_noises(
        keep, forget, noise, chosen, torch.tensor(alpha).double(), torch.tensor(sigma).double()
    )
    m = alpha * keep + sigma * noise_keep
    expected = (Normal(alpha * forget, sigma).log_prob(m) - Normal(alpha * keep, sigma).log_prob(m)).flatten(1).sum(1)
    # alpha and sigma are rounded to float32 above, and the ratio is of size 10.
    assert_close(log_density_ratio(noise_keep, noise_forget), expected, rtol=1e-6, atol=1e-5)
    assert expected.abs().min() > 0.1


def test_the_log_ratio_of_almost_equal_pictures_does_not_cancel() -> None:
    noise = torch.full((1, 100), 1000.0)
    other = noise + 2**-10
    expected = -(100 * (1000 * 2**-10 + 2**-21))
    assert float(log_density_ratio(noise, other)) == pytest.approx(expected, rel=1e-12)
    assert float((noise.square().sum() - other.square().sum()) / 2) != pytest.approx(expected, rel=1e-3)


# --- the weights


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.75])
def test_weights_are_the_papers_where_these_are_finite(mixture: float) -> None:
    log_ratio = torch.linspace(-600, 600, 1001, dtype=torch.float64)
    ratio_a_x, ratio_x_a = log_ratio.exp(), (-log_ratio).exp()
    keep, forget = importance_weights(log_ratio, mixture)
    assert_close(keep, 1 / ((1 - mixture) + mixture * ratio_a_x), rtol=1e-12, atol=0)
    assert_close(forget, 1 / ((1 - mixture) * ratio_x_a + mixture), rtol=1e-12, atol=0)


def test_weights_are_the_logistic_form() -> None:
    log_ratio, mixture = torch.linspace(-30, 30, 61, dtype=torch.float64), 0.3
    odds = math.log((1 - mixture) / mixture)
    keep, forget = importance_weights(log_ratio, mixture)
    assert_close(keep, torch.sigmoid(odds - log_ratio) / (1 - mixture), **EXACT)
    assert_close(forget, torch.sigmoid(log_ratio - odds) / mixture, **EXACT)


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
def test_weights_stay_finite_where_exp_does_not_and_add_up(mixture: float) -> None:
    log_ratio = torch.tensor([-math.inf, -1e30, -1e5, -90.0, 0.0, 90.0, 1e5, 1e30, math.inf])
    assert not log_ratio.exp().isfinite().all()
    keep, forget = importance_weights(log_ratio, mixture)
    assert keep.isfinite().all() and forget.isfinite().all()
    # float32
    assert_close((1 - mixture) * keep + mixture * forget, torch.ones(9), rtol=0, atol=1e-6)
    assert_close(keep[[0, -1]], torch.tensor([1 / (1 - mixture), 0]), rtol=1e-6, atol=0)
    assert_close(forget[[0, -1]], torch.tensor([0, 1 / mixture]), rtol=1e-6, atol=0)
    assert (keep.diff() <= 0).all() and (forget.diff() >= 0).all()


def test_at_the_ends_one_weight_is_one_and_the_other_the_plain_ratio() -> None:
    log_ratio = torch.tensor([-200.0, -3.0, 0.0, 3.0, 200.0], dtype=torch.float64)
    keep, forget = importance_weights(log_ratio, 0.0)
    assert torch.equal(keep, torch.ones(5).double())
    assert_close(forget, log_ratio.exp(), rtol=1e-12, atol=0)
    keep, forget = importance_weights(log_ratio, 1.0)
    assert torch.equal(forget, torch.ones(5).double())
    assert_close(keep, (-log_ratio).exp(), rtol=1e-12, atol=0)
    # What is certain to come from the one is nothing of the other, at the ends too.
    assert importance_weights(torch.tensor([-math.inf]), 0.0) == (torch.ones(1), torch.zeros(1))
    assert importance_weights(torch.tensor([math.inf]), 1.0) == (torch.zeros(1), torch.ones(1))


# --- expectations


@pytest.mark.parametrize("mixture", [0.2, 0.5, 0.8])
def test_by_enumeration_the_weights_turn_the_mixture_into_either_side(mixture: float) -> None:
    q_x = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    q_a = torch.tensor([0.0, 0.1, 0.2, 0.7], dtype=torch.float64)
    f = torch.tensor([3.0, -1.0, 4.0, 1.5], dtype=torch.float64)
    keep, forget = importance_weights(q_a.log() - q_x.log(), mixture)
    q_mixture = (1 - mixture) * q_x + mixture * q_a
    assert_close((q_mixture * keep * f).sum(), (q_x * f).sum(), **EXACT)
    assert_close((q_mixture * forget * f).sum(), (q_a * f).sum(), **EXACT)
    assert abs(float((q_mixture * f).sum() - (q_x * f).sum())) > 0.01


def model(m: Tensor) -> Tensor:
    """A noise prediction that is no polynomial."""
    return 0.3 * m + torch.sin(2 * m) + 0.1


ALPHA, SIGMA = 0.8, 0.6
GRID = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
DENSITY = Normal(0.0, 1.0).log_prob(GRID).exp() * (GRID[1] - GRID[0])
"""Trapezoidal rule over the noise; on an analytic integrand that dies off it is exact to rounding."""


def expected_error(clean: float) -> Tensor:
    """``E_ε ‖ε_θ(γ x + σ ε) − ε‖²``."""
    return (DENSITY * (model(ALPHA * clean + SIGMA * GRID) - GRID).square()).sum()


def siss_terms(keep: float, forget: float, mixture: float) -> tuple[Tensor, Tensor]:
    """Expectations over coin and noise of SISS's two terms, by the functions that the method calls."""
    keep_term, forget_term = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, a = torch.full_like(GRID, keep)[:, None], torch.full_like(GRID, forget)[:, None]
    for chosen, share in ((False, 1 - mixture), (True, mixture)):
        m = ALPHA * (forget if chosen else keep) + SIGMA * GRID
        coin = torch.full((len(GRID),), chosen)
        alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in (ALPHA, SIGMA))
        noise_keep, noise_forget = mixture_noises(x, a, GRID[:, None], coin, alpha, sigma)
        weight_keep, weight_forget = importance_weights(log_density_ratio(noise_keep, noise_forget), mixture)
        keep_term += share * (DENSITY * weight_keep * (model(m) - noise_keep[:, 0]).square()).sum()
        forget_term += share * (DENSITY * weight_forget * (model(m) - noise_forget[:, 0]).square()).sum()
    return keep_term, forget_term


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("keep", "forget"), [(0.3, -1.2), (2.0, 1.9)])
def test_by_quadrature_siss_is_the_two_pass_loss(keep: float, forget: float, mixture: float) -> None:
    keep_term, forget_term = siss_terms(keep, forget, mixture)
    assert_close(keep_term, expected_error(keep), rtol=1e-10, atol=0)
    assert_close(forget_term, expected_error(forget), rtol=1e-10, atol=0)
    assert abs(float(keep_term - forget_term)) > 1e-3


def test_with_the_coefficients_it_is_the_loss_on_what_is_kept() -> None:
    kept, forgotten = [0.3, -0.7, 1.1], [2.0, -1.5]
    everything = [*kept, *forgotten]
    n, k = torch.tensor(5.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    keep_coefficient, forget_coefficient = deletion_coefficients(n, k)
    total = torch.zeros((), dtype=torch.float64)
    for x in everything:
        for a in forgotten:
            keep_term, forget_term = siss_terms(x, a, 0.5)
            total += (keep_coefficient * keep_term - forget_coefficient * forget_term) / (5 * 2)
    expected = torch.stack([expected_error(x) for x in kept]).mean()
    assert_close(total, expected, rtol=1e-10, atol=0)
    assert abs(float(torch.stack([expected_error(x) for x in everything]).mean() - expected)) > 1e-2


# --- gradients


def test_coefficients_by_hand() -> None:
    keep, forget = deletion_coefficients(torch.tensor([10.0, 3.0]), torch.tensor([2.0, 1.0]))
    assert_close(keep, torch.tensor([1.25, 1.5]))
    assert_close(forget, torch.tensor([0.25, 0.5]))
    assert_close(keep - forget, torch.ones(2))


def gradients() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 2.0]), torch.tensor([[-1.5]])]


def test_norms_and_products_are_of_all_gradients_as_one_vector() -> None:
    keep, forget = gradients()
    assert float(global_norm(keep)) == 5.0
    assert float(global_norm(forget)) == 2.5
    assert float(inner_product(keep, forget)) == -6.0


def test_the_subtracted_gradient_gets_the_norm_asked_for() -> None:
    keep, forget = gradients()
    fraction = subtraction_scale(keep, forget, fraction=0.1)
    assert float(fraction) * 2.5 == pytest.approx(0.1 * 5.0)
    norm = subtraction_scale(keep, forget, norm=750)
    assert float(norm) == pytest.approx(300.0)
    # It does not depend on how large the forget gradient is, up or down.
    smaller = [1e-3 * gradient for gradient in forget]
    assert float(subtraction_scale(keep, smaller, norm=750)) == pytest.approx(300e3)
    nothing = [torch.zeros_like(gradient) for gradient in forget]
    assert float(subtraction_scale(keep, nothing, norm=750)) == float(erase_diff_scale(keep, nothing, 0.1)) == 0.0


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.01 + 6.0 / 6.25), (-1.0, 0.0)])
def test_erase_diff_adds_what_lets_the_forget_loss_descend(sign: float, expected: float) -> None:
    keep, forget = gradients()
    forget = [sign * gradient for gradient in forget]
    scale = erase_diff_scale(keep, forget, eta=0.01)
    assert float(scale) == pytest.approx(expected)
    combined = [g_x + scale * g_a for g_x, g_a in zip(keep, forget, strict=True)]
    assert float(inner_product(combined, forget)) >= 0.01 * 6.25 * (1 - 1e-5)
    assert (float(inner_product(keep, forget)) >= 0.01 * 6.25) is (expected == 0)
