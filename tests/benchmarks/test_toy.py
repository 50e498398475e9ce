"""The toy of Appendix A.2: densities in closed form, what ESD's density is, and the strength that draws the ideal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import toy
from matplotlib.figure import Figure
from torch import Tensor
from torch.testing import assert_close
from toy import (
    EXAMPLE,
    NOISE,
    Mixture,
    esd_density,
    esd_grid,
    esd_mixture,
    guided_samples,
    ideal_strength,
    integrate,
    judged_share,
    main,
    sampled_density,
    summary,
    total_variation,
    toy_figure,
)

EDGE, MIDDLE = 2, 1
POINTS = torch.tensor([-9.0, -3.2, -1.0, 0.3, 1.7, 4.0], dtype=torch.float64)


def normal(x: float, mean: float) -> float:
    return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def joint(x: float) -> list[float]:
    return [alpha * normal(x, mu) for alpha, mu in zip(EXAMPLE.weights, EXAMPLE.means, strict=True)]


# --- densities


def test_mixture_ideal_and_posterior_are_their_formulas() -> None:
    ideal = EXAMPLE.without(EDGE)
    for x, density, kept, posterior in zip(
        POINTS.tolist(), EXAMPLE.density(POINTS), ideal.density(POINTS), EXAMPLE.posterior(POINTS), strict=True
    ):
        first, second, third = joint(x)
        assert float(density) == pytest.approx(first + second + third, rel=1e-12)
        assert float(kept) == pytest.approx((first + second) / (0.4 + 0.3), rel=1e-12)
        assert posterior.tolist() == pytest.approx([part / (first + second + third) for part in joint(x)], rel=1e-12)


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0, 3.7])
def test_densities_integrate_to_one(concept: int, eta: float) -> None:
    grid = esd_grid(EXAMPLE, concept, eta)
    for density in (EXAMPLE.density(grid), EXAMPLE.without(concept).density(grid)):
        assert integrate(density, grid) == pytest.approx(1, abs=1e-12)
    # The grid that normalised it may have been too small or too coarse: twice as wide, with another spacing.
    reach = float(grid.abs().max()) * 2
    other = torch.linspace(-reach, reach, int(reach * 60) + 1, dtype=torch.float64)
    assert integrate(esd_density(EXAMPLE, concept, eta, other), other) == pytest.approx(1, abs=1e-12)


def test_the_ideal_has_no_mass_of_the_concept() -> None:
    ideal = EXAMPLE.without(EDGE)
    assert ideal.means == (-3.0, 0.0)
    assert ideal.weights == pytest.approx((4 / 7, 3 / 7))
    # p' = p P(not c | x) / P(not c): what is left of the mixture when the concept's posterior is taken out.
    grid = esd_grid(EXAMPLE, EDGE, 0.0)
    assert_close(ideal.density(grid), EXAMPLE.density(grid) * (1 - EXAMPLE.posterior(grid)[:, EDGE]) / 0.7)
    # Of the mixture, 1e-3 lies right of 6; of the ideal, next to nothing.
    far = grid > 6
    assert integrate(EXAMPLE.density(grid)[far], grid[far]) > 1e-4
    assert integrate(ideal.density(grid)[far], grid[far]) < 1e-8


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
def test_without_strength_esd_gives_the_mixture_back(concept: int) -> None:
    assert_close(esd_density(EXAMPLE, concept, 0.0, POINTS), EXAMPLE.density(POINTS), rtol=1e-12, atol=0)
    assert_close(esd_density(EXAMPLE, concept, 0.5, POINTS) > 0, torch.ones(6, dtype=torch.bool))
    assert (esd_density(EXAMPLE, concept, 0.5, POINTS) - EXAMPLE.density(POINTS)).abs().max() > 0.05


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
@pytest.mark.parametrize("eta", [0.25, 1.0, 2.5])
def test_both_forms_of_esds_density_agree(concept: int, eta: float) -> None:
    # Prop. 2: p(x) p(c|x)^-eta. Appendix A.2: (sum_j alpha_j N_j)^(eta + 1) (alpha_c N_c)^-eta.
    density = esd_density(EXAMPLE, concept, eta, POINTS)
    parts = [joint(x) for x in POINTS.tolist()]
    proposition = [sum(part) * (part[concept] / sum(part)) ** -eta for part in parts]
    appendix = [sum(part) ** (eta + 1) * part[concept] ** -eta for part in parts]
    for form in (proposition, appendix):
        constants = torch.tensor(form, dtype=torch.float64) / density
        assert_close(constants, constants[:1].expand(6), rtol=1e-11, atol=0)
    # With the exponent 1 on the mixture it would be another density.
    slip = torch.tensor([sum(part) * part[concept] ** -eta for part in parts], dtype=torch.float64) / density
    assert slip.max() > 1.5 * slip.min()


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
@pytest.mark.parametrize("eta", [0, 1, 2, 4])
def test_a_whole_strength_expands_into_normals(concept: int, eta: int) -> None:
    expanded, grid = esd_mixture(EXAMPLE, concept, eta), esd_grid(EXAMPLE, concept, eta)
    # Two ways to the same density: numerical normalisation, and Gaussian algebra. The peak is about 0.4.
    assert_close(esd_density(EXAMPLE, concept, eta, grid), expanded.density(grid), rtol=0, atol=1e-12)
    if eta == 0:
        assert expanded.weights == pytest.approx(EXAMPLE.weights)
        return
    # The heaviest is the component farthest from the concept, moved on by eta times its distance.
    _, heaviest = max(zip(expanded.weights, expanded.means, strict=True))
    assert heaviest == pytest.approx(-3 + eta * (-3 - EXAMPLE.means[concept]))


def test_two_components_by_hand() -> None:
    # p = N(0)/2 + N(m)/2 without N(m), eta 1: p^2 / N(m) has N(-m) exp(m^2), 2 N(0) and N(m), all times 1/4 over 1/2.
    mean = 1.5
    total = math.exp(mean**2) + 3
    expanded = esd_mixture(Mixture((0.5, 0.5), (0.0, mean)), 1, 1)
    found = dict(zip(expanded.means, expanded.weights, strict=True))
    assert found == pytest.approx({-mean: math.exp(mean**2) / total, 0.0: 2 / total, mean: 1 / total})


# --- what ESD does to the survivors


def test_a_large_strength_empties_the_overlap_that_the_ideal_keeps() -> None:
    for concept, kept in ((EDGE, 0.042), (MIDDLE, 0.091)):
        ideal, grid = EXAMPLE.without(concept), esd_grid(EXAMPLE, concept, 1.0)
        assert judged_share(EXAMPLE, concept, ideal.density(grid), grid) == pytest.approx(kept, abs=5e-4)
        assert judged_share(EXAMPLE, concept, esd_density(EXAMPLE, concept, 1.0, grid), grid) < 5e-3 * kept
        assert judged_share(EXAMPLE, concept, EXAMPLE.density(grid), grid) == pytest.approx(0.3, abs=1e-12)


def test_with_strength_one_the_judged_share_is_one_over_the_mean_inverse_posterior() -> None:
    # p~ = p / p(c|x) / Z, so the mean of p(c|x) is 1 / Z, and Z is the mean of 1 / p(c|x) under p.
    mixture = Mixture((0.5, 0.5), (0.0, 1.5))
    grid = esd_grid(mixture, 1, 1.0)
    share = judged_share(mixture, 1, esd_density(mixture, 1, 1.0, grid), grid)
    inverse = integrate(mixture.density(grid) / mixture.posterior(grid)[:, 1], grid)
    assert share == pytest.approx(1 / inverse, rel=1e-10)


def test_survivors_leave_their_places_and_a_small_strength_is_nearest() -> None:
    rows = {concept: summary(EXAMPLE, concept, (0.0, 0.05, 0.1, 0.25, 1.0)) for concept in (EDGE, MIDDLE)}
    distances = {concept: [row["distance"] for row in found] for concept, found in rows.items()}
    # As docs/toy.md says.
    assert distances[EDGE] == pytest.approx([0.274, 0.231, 0.344, 0.654, 0.998], abs=6e-4)
    assert distances[MIDDLE] == pytest.approx([0.244, 0.192, 0.174, 0.271, 0.867], abs=6e-4)
    sampled = {concept: [row["sampled_distance"] for row in found] for concept, found in rows.items()}
    assert sampled[EDGE] == pytest.approx([0.274, 0.257, 0.277, 0.396, 0.868], abs=2e-3)
    assert sampled[MIDDLE] == pytest.approx([0.244, 0.223, 0.212, 0.245, 0.597], abs=2e-3)


# --- the strength that draws the ideal


def score(mixture: Mixture, x: Tensor, signal: float) -> Tensor:
    """By autograd, of the mixture under noise."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.log_joint(x, signal).logsumexp(-1).sum(), x)
    return gradient


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
@pytest.mark.parametrize("signal", [1.0, 0.6, 0.1])
def test_esds_guidance_with_the_posterior_odds_is_the_ideals_score(concept: int, signal: float) -> None:
    alone = Mixture((1.0,), (EXAMPLE.means[concept],))
    unguided, towards = score(EXAMPLE, POINTS, signal), score(alone, POINTS, signal)
    guided = unguided - ideal_strength(EXAMPLE, concept, POINTS, signal) * (towards - unguided)
    expected = score(EXAMPLE.without(concept), POINTS, signal)
    assert_close(guided, expected, rtol=1e-9, atol=1e-9)
    assert (unguided - expected).abs().max() > 0.01
    assert (unguided - (towards - unguided) - expected).abs().max() > 0.1  # a constant 1 is another score


def test_noise_leaves_the_prior_odds() -> None:
    # In pure noise nothing is known of the component; without noise the odds run over orders of magnitude.
    assert_close(ideal_strength(EXAMPLE, EDGE, POINTS, 0.0), torch.full_like(POINTS, 0.3 / 0.7))
    odds = ideal_strength(EXAMPLE, EDGE, POINTS)
    assert odds[0] < 1e-8
    assert odds[-1] > 1e3


@pytest.mark.parametrize("concept", [EDGE, MIDDLE])
def test_the_sampler_guided_by_the_odds_draws_the_ideal(concept: int) -> None:
    starts = torch.linspace(-4, 4, 81, dtype=torch.float64)
    ends = guided_samples(EXAMPLE, concept, None, starts)
    # Quantiles keep their order. Fifty steps of Runge and Kutta are good for 1e-7.
    assert_close(EXAMPLE.without(concept).cumulative(ends), NOISE.cumulative(starts), rtol=0, atol=1e-6)
    unguided = guided_samples(EXAMPLE, concept, 0.0, starts)
    assert_close(EXAMPLE.cumulative(unguided), NOISE.cumulative(starts), rtol=0, atol=1e-6)
    constant = guided_samples(EXAMPLE, concept, 1.0, starts)
    assert (EXAMPLE.without(concept).cumulative(constant) - NOISE.cumulative(starts)).abs().max() > 0.2


def test_a_prior_taken_too_small_leaves_some_of_the_concept() -> None:
    starts = torch.linspace(-4, 4, 81, dtype=torch.float64)
    ends = guided_samples(EXAMPLE, EDGE, None, starts, prior=0.2)
    # p - 0.2 p(.|c) has a tenth of the concept left, of 0.8 in all.
    left = Mixture((0.4 / 0.8, 0.3 / 0.8, 0.1 / 0.8), EXAMPLE.means)
    assert_close(left.cumulative(ends), NOISE.cumulative(starts), rtol=0, atol=1e-6)
    assert_close(ideal_strength(EXAMPLE, EDGE, POINTS, prior=0.0), torch.zeros_like(POINTS))


def test_sampled_densities_integrate_to_one() -> None:
    for eta in (0.0, 1.0, None):
        x, density = sampled_density(EXAMPLE, EDGE, eta)
        assert bool((x.diff() > 0).all())
        assert integrate(density, x) == pytest.approx(1, abs=1e-4)
    assert total_variation(density, EXAMPLE.without(EDGE).density(x), x) < 1e-4


# --- bad input, figure


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"weights=\(0\.5, 0\.6\) must be positive and have the sum 1"):
        Mixture((0.5, 0.6), (0.0, 1.0))
    with pytest.raises(ValueError, match="must have one entry each per component"):
        Mixture((0.5, 0.5), (0.0,))
    with pytest.raises(ValueError, match=r"concept=3 must lie in \[0, 2\]"):
        EXAMPLE.without(3)
    with pytest.raises(ValueError, match="the only component"):
        NOISE.without(0)
    with pytest.raises(ValueError, match=r"eta=-1\.0 must be a finite number, zero or larger"):
        esd_density(EXAMPLE, EDGE, -1.0, POINTS)
    with pytest.raises(ValueError, match=r"eta=0\.5 must be a whole number"):
        esd_mixture(EXAMPLE, EDGE, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prior=0\.4 must lie in \[0, 0\.3\]: beyond it .* negative"):
        ideal_strength(EXAMPLE, EDGE, POINTS, prior=0.4)


def test_the_figure_has_its_panels() -> None:
    figure = toy_figure()
    assert [axes.get_title()[:1] for axes in figure.axes] == list("abcdef")
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in figure.axes)
    (ideal,) = [line for line in figure.axes[0].get_lines() if "ideal" in line.get_label()]
    x = torch.as_tensor(ideal.get_xdata())
    assert_close(torch.as_tensor(ideal.get_ydata()), EXAMPLE.without(EDGE).density(x))
    labels = [line.get_label() for line in figure.axes[1].get_lines()]
    assert [label for label in labels if "η" in label] == [f"ESD, η = {eta}" for eta in (0.1, 0.25, 0.5, 1)]


def test_the_command_writes_the_figure_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "toy_figure", Figure)  # the real one is drawn above
    row = {"eta": 0.5, "distance": 0.9, "sampled_distance": 0.6, "concept": 0.1, "sampled_concept": 0.2}
    monkeypatch.setattr(toy, "summary", lambda *_: [row])
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([str(tmp_path / "toy.png")]) == 0
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("0.500             0.900             0.600             0.100             0.200") == 2
    assert "concept in the ideal: 0.042" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["toy.png"]
