"""SPEED's closed form against its formula as printed, against the constrained problem that it solves, and its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.matrices import SingularSystemError
from lit_unlearn.core.null_space import NullSpaceBasis, null_space, null_space_from_keys
from lit_unlearn.core.speed import (
    augmented,
    erasing_update,
    k_means,
    most_influenced,
    relative_output,
    retained_null_space,
    speed_condition,
    speed_update,
)

D_OUT, D_IN = 5, 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WEIGHT, KEYS, ANCHORS = normal(D_OUT, D_IN, seed=1), normal(3, D_IN, seed=2), normal(3, D_IN, seed=3)
RETAINED, INVARIANTS = normal(5, D_IN, seed=4), normal(2, D_IN, seed=5)
FREE = null_space_from_keys(RETAINED, 1e-10, "max")


def as_printed(retain_scale: float, lamb: float, invariants: Tensor = INVARIANTS, num_texts: int = 3) -> Tensor:
    """The formula with columns and inverses, as it is written."""
    W, P, K2 = WEIGHT, FREE.projection, invariants.mT
    C1, C_star = KEYS.mT @ KEYS / num_texts, ANCHORS.mT @ KEYS / num_texts
    eye = torch.eye(D_IN, dtype=torch.float64)
    M = torch.linalg.inv(C1 @ P + retain_scale * eye)
    inner = torch.linalg.inv(K2.mT @ P @ M @ K2 + lamb * torch.eye(K2.shape[1], dtype=torch.float64))
    return W @ (C_star - C1) @ P @ (eye - M @ K2 @ inner @ K2.mT @ P) @ M


# --- the update


@pytest.mark.parametrize(("retain_scale", "lamb"), [(1.0, 0.0), (0.05, 0.0), (0.7, 0.5), (3.0, 10.0)])
@pytest.mark.parametrize("num_texts", [None, 1])
def test_update_is_the_printed_formula(retain_scale: float, lamb: float, num_texts: int | None) -> None:
    update = speed_update(WEIGHT, KEYS, ANCHORS, FREE, INVARIANTS, retain_scale, lamb, num_texts)
    assert_close(update, as_printed(retain_scale, lamb, num_texts=num_texts or 3), rtol=0, atol=1e-12)
    assert update.norm() > 0.1


@pytest.mark.parametrize("retain_scale", [1.0, 0.1])
def test_update_solves_the_constrained_least_squares(retain_scale: float) -> None:
    # Unknowns: the entries of Delta, row by row. Constraints: Delta (I - P) = 0 and Delta K2 = 0. Solved by the KKT
    # system as one large least-squares problem, whose multipliers need not be unique.
    eye_out, eye_in = torch.eye(D_OUT, dtype=torch.float64), torch.eye(D_IN, dtype=torch.float64)
    hessian = torch.kron(eye_out, KEYS.mT @ KEYS / len(KEYS) + retain_scale * eye_in)
    gradient = (WEIGHT @ (ANCHORS - KEYS).mT @ KEYS / len(KEYS)).flatten()
    constraints = torch.kron(eye_out, torch.cat([eye_in - FREE.projection, INVARIANTS]))
    empty = torch.zeros(len(constraints), len(constraints), dtype=torch.float64)
    kkt = torch.cat([torch.cat([hessian, constraints.mT], 1), torch.cat([constraints, empty], 1)])
    right = torch.cat([gradient, gradient.new_zeros(len(constraints))])
    solution = torch.linalg.lstsq(kkt, right.unsqueeze(1), driver="gelsd").solution[: D_OUT * D_IN, 0]
    update = speed_update(WEIGHT, KEYS, ANCHORS, FREE, INVARIANTS, retain_scale)
    assert_close(update, solution.view(D_OUT, D_IN), rtol=0, atol=1e-10)


def test_lamb_is_the_weight_of_a_penalty_on_the_invariants() -> None:
    retain_scale, lamb = 0.5, 0.3
    update = speed_update(WEIGHT, KEYS, ANCHORS, FREE, INVARIANTS, retain_scale, lamb)
    factor = update @ FREE.basis
    factor.requires_grad_(True)
    delta = factor @ FREE.basis.mT
    objective = (
        (KEYS @ (WEIGHT + delta).mT - ANCHORS @ WEIGHT.mT).square().sum() / len(KEYS)
        + retain_scale * delta.square().sum()
        + (INVARIANTS @ delta.mT).square().sum() / lamb
    )
    (slope,) = torch.autograd.grad(objective, factor)
    # At the minimum of a quadratic of size 1e1 the gradient is rounding.
    assert slope.abs().max() < 1e-12
    assert (INVARIANTS @ update.mT).norm() > 1e-3


def test_retained_keys_and_invariants_stay_to_rounding() -> None:
    update = speed_update(WEIGHT, KEYS, ANCHORS, FREE, INVARIANTS, 0.1)
    assert relative_output(update, WEIGHT, RETAINED) < 1e-13
    assert relative_output(update, WEIGHT, INVARIANTS) < 1e-13
    assert relative_output(update, WEIGHT, KEYS) > 0.1
    # Neither holds by itself.
    assert relative_output(speed_update(WEIGHT, KEYS, ANCHORS, FREE, None, 0.1), WEIGHT, INVARIANTS) > 0.01
    everything = NullSpaceBasis(torch.eye(D_IN, dtype=torch.float64), torch.zeros(D_IN), 1.0)
    assert relative_output(speed_update(WEIGHT, KEYS, ANCHORS, everything, INVARIANTS), WEIGHT, RETAINED) > 0.01


def test_invariants_that_depend_on_each_other_need_no_lamb() -> None:
    # A copy, a sum, and a key that the projector has removed: K2^T P M K2 is singular.
    redundant = torch.cat([INVARIANTS, INVARIANTS[:1], INVARIANTS.sum(0, keepdim=True), RETAINED[:1]])
    expected = as_printed(1.0, 0.0)
    assert_close(speed_update(WEIGHT, KEYS, ANCHORS, FREE, redundant), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_keys", [3, 7, 20])
@pytest.mark.parametrize("num_texts", [None, 2])
def test_condition_is_that_of_the_system(num_keys: int, num_texts: int | None) -> None:
    # Fewer keys than the seven free directions, as many, and more.
    keys, retain_scale = normal(num_keys, D_IN, seed=6), 1e-3
    system = FREE.basis.mT @ keys.mT @ keys @ FREE.basis / (num_texts or num_keys)
    expected = torch.linalg.cond(system + retain_scale * torch.eye(FREE.dimension, dtype=torch.float64)).item()
    assert speed_condition(keys, FREE, retain_scale, num_texts) == pytest.approx(expected, rel=1e-9)
    assert expected > 2


def test_a_retain_scale_that_is_lost_in_rounding_is_refused() -> None:
    with pytest.raises(
        SingularSystemError, match=r"The 7 x 7 system is singular with retain_scale=1e-20: .* retain_scale"
    ):
        speed_update(WEIGHT, KEYS, ANCHORS, FREE, None, 1e-20)
    assert speed_update(WEIGHT, KEYS, ANCHORS, FREE, None, 1e-9).isfinite().all()


def test_a_small_retain_scale_reaches_the_anchors() -> None:
    outputs = KEYS @ (WEIGHT + speed_update(WEIGHT, KEYS, ANCHORS, FREE, INVARIANTS, 1e-9)).mT
    # Three keys, seven free directions, two of them taken by invariants: the anchors' outputs can be had exactly.
    assert_close(outputs, ANCHORS @ WEIGHT.mT, rtol=0, atol=1e-6)
    assert (KEYS @ WEIGHT.mT - ANCHORS @ WEIGHT.mT).abs().max() > 1


def test_anchors_equal_to_the_keys_change_nothing() -> None:
    assert speed_update(WEIGHT, KEYS, KEYS, FREE, INVARIANTS).abs().max() == 0


# --- the filter


def test_the_erasing_update_is_its_formula_and_moves_keys_to_anchors() -> None:
    C1, C_star = KEYS.mT @ KEYS / 3, ANCHORS.mT @ KEYS / 3
    expected = WEIGHT @ (C_star - C1) @ torch.linalg.inv(torch.eye(D_IN, dtype=torch.float64) + C1)
    update = erasing_update(WEIGHT, KEYS, ANCHORS)
    assert_close(update, expected, rtol=0, atol=1e-12)
    goal = ANCHORS @ WEIGHT.mT
    assert (KEYS @ (WEIGHT + update).mT - goal).norm() < 0.5 * (KEYS @ WEIGHT.mT - goal).norm()
    assert_close(erasing_update(WEIGHT, KEYS, ANCHORS, num_texts=3), update)
    assert not torch.allclose(erasing_update(WEIGHT, KEYS, ANCHORS, num_texts=1), update)


def test_the_filter_keeps_exactly_what_is_moved_more_than_the_mean() -> None:
    update, keys = erasing_update(WEIGHT, KEYS, ANCHORS), normal(40, D_IN, seed=6)
    shifts = [float((update @ key).square().sum()) ** 0.5 for key in keys]
    mean = math.fsum(shifts) / len(shifts)
    assert most_influenced(keys, update).tolist() == [shift > mean for shift in shifts]
    assert 5 < most_influenced(keys, update).sum() < 35


def test_keys_that_are_moved_alike_all_stay() -> None:
    update = erasing_update(WEIGHT, KEYS, ANCHORS)
    assert most_influenced(RETAINED[:1], update).tolist() == [True]
    assert most_influenced(RETAINED[:1].repeat(4, 1), update).tolist() == [True] * 4


# --- the augmentation


@pytest.mark.parametrize("d_out", [5, 12, 20])
def test_copies_move_along_the_direction_that_the_layer_sees_least(d_out: int) -> None:
    weight = normal(d_out, D_IN, seed=7)
    copies = augmented(RETAINED, weight, 10, generator())
    moves = copies - RETAINED.repeat(10, 1)
    singular_values = torch.linalg.svdvals(weight)
    lengths = moves.norm(dim=1)
    assert torch.linalg.matrix_rank(moves) == 1
    # Every copy's output changes by the smallest singular value times the length of its move.
    assert_close((moves @ weight.mT).norm(dim=1), singular_values[-1] * lengths, rtol=1e-8, atol=1e-12)
    other = normal(1, d_out, seed=8) @ weight  # a direction that the layer sees
    assert (other @ weight.mT).norm() / other.norm() > 1.5 * singular_values[-1]
    # Lengths are those of one standard normal number each: 50 of them.
    assert 0.6 < float(lengths.square().mean()) < 1.6
    assert len(torch.unique(lengths)) == 50


def test_copies_depend_on_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(augmented(RETAINED, WEIGHT, 2, generator(3)), augmented(RETAINED, WEIGHT, 2, generator(3)))
    assert not torch.equal(augmented(RETAINED, WEIGHT, 2, generator(3)), augmented(RETAINED, WEIGHT, 2, generator(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert augmented(RETAINED, WEIGHT, 0, generator()).shape == (0, D_IN)


@pytest.mark.parametrize("num_keys", [5, 40])
def test_the_null_space_of_few_and_of_many_keys(num_keys: int) -> None:
    keys = normal(num_keys, D_IN, seed=9) * torch.linspace(0.01, 2, D_IN, dtype=torch.float64)
    space = retained_null_space(keys, 0.1, "absolute")
    expected = null_space(keys.mT @ keys, 0.1, "absolute", num_keys)
    assert 0 < space.dimension == expected.dimension < D_IN
    assert_close(space.projection, expected.projection, rtol=0, atol=1e-10)
    assert retained_null_space(keys, 1e-30, "absolute", minimum=8).dimension >= 8


# --- centres


def test_centres_are_the_means_of_separate_clusters() -> None:
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    points = (places.unsqueeze(1) + 0.1 * normal(3, 20, 2)).flatten(0, 1)[torch.randperm(60, generator=generator())]
    for seed in range(5):
        centres = k_means(points, 3, generator(seed))
        nearest = (points.unsqueeze(1) - places).norm(dim=-1).argmin(1)
        means = torch.stack([points[nearest == place].mean(0) for place in range(3)])
        order = [int((centres - place).norm(dim=1).argmin()) for place in places]
        assert_close(centres[order], means, rtol=0, atol=1e-12)


def test_centres_are_a_fixed_point() -> None:
    points = normal(50, 4, seed=10)
    centres = k_means(points, 3, generator())
    nearest = torch.cdist(points, centres).argmin(1)
    assert sorted(set(nearest.tolist())) == [0, 1, 2]
    assert_close(centres, torch.stack([points[nearest == place].mean(0) for place in range(3)]), rtol=0, atol=1e-12)
    assert torch.equal(centres, k_means(points, 3, generator()))


def test_of_ten_starts_the_one_with_the_least_inertia_is_kept() -> None:
    """Outlying points, such as the first states of the padding, draw a single start into a poor minimum."""
    points = torch.cat([normal(30, 4, seed=10), 9 + normal(2, 4, seed=11), 8 * normal(3, 4, seed=12)])

    def inertia(seed: int, starts: int) -> float:
        return float(
            torch.cdist(points, k_means(points, 3, generator(seed), starts=starts)).min(1).values.square().sum()
        )

    alone = [inertia(seed, 1) for seed in range(20)]
    assert max(alone) > 1.05 * min(alone)
    assert [inertia(seed, 10) for seed in range(20)] == pytest.approx([min(alone)] * 20, rel=1e-9)


def test_no_more_centres_than_distinct_points() -> None:
    points = normal(2, 4).repeat(5, 1)
    assert sorted(k_means(points, 3, generator())[:, 0].tolist()) == pytest.approx(sorted(points[:2, 0].tolist()))
    assert_close(k_means(points, 1, generator()), points.mean(0, keepdim=True))


# --- bad input


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"retain_scale=0\.0 must be a positive number"):
        speed_update(WEIGHT, KEYS, ANCHORS, FREE, retain_scale=0.0)
    with pytest.raises(ValueError, match=r"lamb=-1\.0 must be a finite number, zero or larger"):
        speed_update(WEIGHT, KEYS, ANCHORS, FREE, lamb=-1.0)
    with pytest.raises(ValueError, match="keys is empty"):
        speed_update(WEIGHT, KEYS[:0], ANCHORS[:0], FREE)
    with pytest.raises(ValueError, match=r"anchor_keys has shape \(2, 12\), expected \(3, 12\)"):
        erasing_update(WEIGHT, KEYS, ANCHORS[:2])
    with pytest.raises(ValueError, match=r"invariants has shape \(2, 3\)"):
        speed_update(WEIGHT, KEYS, ANCHORS, FREE, normal(2, 3))
    with pytest.raises(ValueError, match=r"num_centres=4 must lie in \[1, 3\]"):
        k_means(KEYS, 4, generator())
