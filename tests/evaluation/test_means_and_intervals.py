"""Harmonic means of scores, and Wilson's interval of a share."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lit_unlearn.evaluation.metrics import both_harmonic_means, harmonic_mean, wilson_interval

NAN = math.nan


# harmonic means


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 0.5) == 0.5
    assert harmonic_mean(0.25, 0.75) == pytest.approx(2 / (1 / 0.25 + 1 / 0.75))
    assert harmonic_mean(0, 0) == 0
    assert harmonic_mean(0, 1) == 0
    assert math.isnan(harmonic_mean(NAN, 1))
    with pytest.raises(ValueError, match="negative"):
        harmonic_mean(-0.1, 0.5)


def test_both_harmonic_means_differ_when_one_concept_was_not_forgotten() -> None:
    of_averages, average = both_harmonic_means([0.0, 1.0], [1.0, 1.0])
    assert of_averages == pytest.approx(2 * 0.5 / 1.5)
    assert average == 0.5
    with pytest.raises(ValueError, match="1 forget and 2 retain"):
        both_harmonic_means([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="0 forget"):
        both_harmonic_means([], [])


# Wilson interval


def test_wilson_interval_solves_its_equation() -> None:
    # Its bounds are the shares p at which |successes/trials - p| is z standard errors of p itself.
    z = 1.959963984540054
    for successes, trials in ((1, 10), (5, 10), (19, 20), (137, 400)):
        for bound in wilson_interval(successes, trials):
            deviation = abs(successes / trials - bound)
            assert deviation == pytest.approx(z * math.sqrt(bound * (1 - bound) / trials), abs=1e-12)


def test_wilson_interval_known_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)  # z^2 / (n + z^2)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_covers_as_often_as_it_says() -> None:
    trials = 40
    for true_share in (0.1, 0.5, 0.9):
        binomial = [math.comb(trials, k) * true_share**k * (1 - true_share) ** (trials - k) for k in range(trials + 1)]
        covered = 0.0
        for k, probability in enumerate(binomial):
            low, high = wilson_interval(k, trials)
            covered += probability * (low <= true_share <= high)
        assert 0.92 < covered < 0.98  # counts are whole numbers, so never exactly 0.95


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_interval_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|confidence"):
        wilson_interval(*arguments)
