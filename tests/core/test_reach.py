"""The reach against a plain minimisation, and what it must be whatever the numbers are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.closed_form import null_space_update, second_moment
from lit_unlearn.core.null_space import NullSpaceBasis, null_space
from lit_unlearn.core.reach import (
    MOST_KEYS,
    TOLERANCE,
    largest_norm,
    on_retained_span,
    reach,
    reach_report,
    retained_directions,
)
from lit_unlearn.core.solvers import Retained, Write

D_IN = 8
SIZES = [(5, 3), (5, 8), (12, 6), (8, 8)]
"""Outputs of a map and retained directions: the range is a part of the outputs or not, the span of the inputs or not.
"""


def span(count: int, d_in: int = D_IN, seed: int = 0) -> Tensor:
    """Orthonormal columns (d_in, count); those of a smaller count with this seed are the first ones."""
    return torch.linalg.qr(normal(d_in, d_in, seed=seed))[0][:, :count]


def by_descent(weight: Tensor, directions: Tensor, output: Tensor, longest: float) -> float:
    """Least relative distance by projected gradient descent with momentum (Beck & Teboulle, 2009), float64."""
    matrix = weight @ directions
    step = 1 / float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    key = ahead = torch.zeros(directions.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(20_000):
        moved = ahead - step * (matrix.mT @ (matrix @ ahead - output))
        moved = moved * min(1.0, longest / max(float(moved.norm()), 1e-300))
        further = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / further * (moved - key)
        done = float((moved - key).norm()) <= 1e-14 * float(moved.norm())
        key, momentum = moved, further
        if done:
            break
    return float((matrix @ key - output).norm() / output.norm())


@pytest.mark.parametrize("longest", [0.05, 1.0, 3.0, 1e3])
@pytest.mark.parametrize(("d_out", "count"), SIZES)
def test_no_key_of_the_span_comes_nearer(d_out: int, count: int, longest: float) -> None:
    weight, directions = normal(d_out, D_IN, seed=1), span(count)
    outputs = normal(3, D_IN, seed=2) @ weight.mT
    found = reach(on_retained_span(weight, directions), outputs, longest)
    expected = [by_descent(weight, directions, output, longest) for output in outputs]
    # Singular values below 1e-7 of the largest count as zero, and the descent ends near its goal.
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    assert longest > 1 or (found > 0.01).all()


def test_a_spectrum_over_twelve_orders_is_solved() -> None:
    left, right = span(40, 40, seed=1), span(40, 40, seed=2)
    matrix = left @ torch.diag(torch.logspace(0, -6, 40, dtype=torch.float64)) @ right.mT
    outputs = normal(20, 40)
    singular = torch.logspace(0, -6, 40, dtype=torch.float64)
    parts = outputs @ left
    for longest in (1e-3, 1.0, 1e3, 1e5):
        # The shift by bisection, and the distance by its formula: sum of (shift / (s^2 + shift))^2 of the parts.
        low, high = torch.zeros(20, 1, dtype=torch.float64), torch.full((20, 1), 1e9, dtype=torch.float64)
        for _ in range(200):
            middle = (low * high).sqrt() if bool((low > 0).all()) else (low + high) / 2
            too_long = (parts * singular / (singular**2 + middle)).norm(dim=1, keepdim=True) > longest
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
        expected = (parts * high / (singular**2 + high)).norm(dim=1) / outputs.norm(dim=1)
        assert_close(reach(matrix, outputs, longest), expected, rtol=1e-6, atol=1e-7)


def test_a_concept_whose_key_is_in_the_span_and_short_enough_is_reached() -> None:
    weight, directions = normal(5, D_IN, seed=1), span(4)
    keys = normal(6, 4, seed=2) @ directions.mT
    on_span = on_retained_span(weight, directions)
    longest = largest_norm(keys)
    assert longest == float(keys.norm(dim=1).max())
    assert reach(on_span, keys @ weight.mT, longest).max() < 1e-7
    # Twice the key is too long for the longest one, and a key of the other directions is not in the span.
    twice = reach(on_span, 2 * keys @ weight.mT, longest)
    assert float(twice[keys.norm(dim=1).argmax()]) > 1e-3
    others = normal(6, 4, seed=3) @ span(8)[:, 4:].mT
    assert reach(on_span, others @ weight.mT, longest).min() > 1e-3


def test_more_directions_and_longer_keys_reach_farther() -> None:
    weight = normal(6, D_IN, seed=1)
    outputs = normal(20, D_IN, seed=2) @ weight.mT
    found = torch.stack(
        [
            torch.stack([reach(on_retained_span(weight, span(count)), outputs, longest) for longest in (0.1, 1, 3, 50)])
            for count in range(1, D_IN + 1)
        ]
    )
    assert (found.diff(dim=0) <= 1e-9).all() and (found.diff(dim=1) <= 1e-9).all()
    assert (found >= 0).all() and (found <= 1).all()
    assert found[-1, -1].max() < 1e-7  # without a bound that matters, the keys that fill the space reach everything
    assert found[0, 0].min() > 0.5


def free_of(moment: Tensor) -> NullSpaceBasis:
    return null_space(moment, 1e-8, "max")


def test_an_edit_within_the_null_space_does_not_raise_it_and_another_does() -> None:
    kept, edited, weight = normal(3, D_IN, seed=3), normal(2, D_IN, seed=4), normal(5, D_IN, seed=1)
    free, outputs = free_of(second_moment(kept)), edited @ weight.mT
    values = normal(2, 5, seed=5)
    within = null_space_update(weight, edited, values, free, 1e-3)
    across = null_space_update(weight, edited, values, torch.eye(D_IN, dtype=torch.float64), 1e-3)
    before, after, other = (
        reach(on_retained_span(changed, free), outputs, 2.0) for changed in (weight, weight + within, weight + across)
    )
    assert within.norm() > 0.1 * weight.norm()
    assert_close(before, after, rtol=1e-9, atol=1e-9)
    assert (other - before).abs().max() > 1e-2


def test_the_span_is_the_complement_of_the_null_space() -> None:
    kept, weight = normal(3, D_IN, seed=3), normal(5, D_IN, seed=1)
    moment = second_moment(kept)
    directions = retained_directions(moment)
    assert directions.shape == (D_IN, 3)
    assert_close(on_retained_span(weight, directions), on_retained_span(weight, free_of(moment)), rtol=0, atol=1e-9)
    # A direction counts from 1e-2 of the mean eigenvalue on.
    eigenvalues = torch.tensor([0.0, 0.9e-2, 1.1e-2, 1.0, 8 - 2 - 2e-2, 0.5, 0.25, 0.25], dtype=torch.float64)
    assert retained_directions(torch.diag(eigenvalues)).shape == (D_IN, 6)
    assert retained_directions(torch.zeros(D_IN, D_IN, dtype=torch.float64)).shape == (D_IN, 0)


def test_nothing_is_reached_from_an_empty_span_and_zero_always() -> None:
    nothing = on_retained_span(normal(5, D_IN), span(0))
    outputs = torch.cat([normal(2, 5), torch.zeros(1, 5)])
    assert reach(nothing, outputs, 1.0).tolist() == [1, 1, 0]
    assert reach(on_retained_span(normal(5, D_IN), span(2)), torch.zeros(1, 5), 1.0).tolist() == [0]
    assert largest_norm(torch.zeros(0, D_IN)) == 0


@pytest.mark.parametrize("longest", [0.0, -1.0, float("nan"), float("inf")])
def test_a_length_that_bounds_nothing_is_refused(longest: float) -> None:
    with pytest.raises(ValueError, match=r"longest=.* must be a positive number: the length of the longest"):
        reach(normal(5, D_IN), normal(2, 5), longest)


# --- of a write

WEIGHT = normal(5, D_IN, seed=1)


def write(keys: Tensor, values: Tensor | None = None, longest: float | None = 2.0, **fields: object) -> Write:
    retained = Retained(second_moment(normal(3, D_IN, seed=3)), 3, largest_norm=longest)
    values = torch.zeros(len(keys), 5) if values is None else values
    return Write("w", WEIGHT, torch.float64, keys, values, retained, **fields)  # type: ignore[arg-type]


def test_the_report_is_of_the_keys_that_carry_the_concept() -> None:
    keys = normal(9, D_IN, seed=2)
    outputs = keys @ WEIGHT.mT
    directions = span(3)
    expected = reach(on_retained_span(WEIGHT, directions), outputs, 2.0)
    of_all = reach_report(write(keys), WEIGHT, directions)
    assert of_all == pytest.approx({"reach": float(expected.median()), "least_reach": float(expected.min())}, rel=1e-12)
    # The first three keep their outputs (up to rounding), the last two come before the concept.
    values = torch.cat([outputs[:3] * (1 + TOLERANCE / 2), outputs[3:] * (1 + 2 * TOLERANCE)])
    carry = torch.tensor([True] * 7 + [False] * 2)
    some = reach_report(write(keys, values, concept_keys=carry), WEIGHT, directions)
    assert some["reach"] == pytest.approx(float(expected[3:7].quantile(0.5)), rel=1e-12)
    assert some["least_reach"] == pytest.approx(float(expected[3:7].min()), rel=1e-12)
    assert reach_report(write(keys, outputs), WEIGHT, directions) == {}
    assert reach_report(write(keys, longest=None), WEIGHT, directions) == {}
    # The outputs are those of the unedited weight, whatever the write starts from.
    moved = dataclasses.replace(write(keys), weight=2 * WEIGHT)
    assert reach_report(moved, WEIGHT, directions) == of_all


def test_many_keys_are_drawn_from_all_positions() -> None:
    length = 77
    prompts = normal(MOST_KEYS, 1, D_IN, seed=2).expand(-1, length, -1)
    position = torch.linspace(1, 5, length, dtype=torch.float64).view(1, -1, 1)
    keys = (prompts + position * normal(length, D_IN, seed=4)).flatten(0, 1)
    found = reach_report(write(keys), WEIGHT, span(3))
    assert found == reach_report(write(keys), WEIGHT, span(3))
    exact = reach(on_retained_span(WEIGHT, span(3)), keys @ WEIGHT.mT, 2.0)
    # Every n-th key would be of a single position: n is the length of a prompt.
    assert len(keys) // MOST_KEYS == length
    assert found["reach"] == pytest.approx(float(exact.quantile(0.5)), abs=0.02)
    assert abs(float(exact.view(-1, length)[:, 0].quantile(0.5)) - found["reach"]) > 0.02
