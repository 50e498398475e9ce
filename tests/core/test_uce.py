"""UCE of all matrices at once against the published formula, against one matrix at a time, and in its limits.

Everything runs in float64, so tolerances of 1e-10 are a few hundred roundings wide.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core import least_squares_system
from lit_unlearn.core.closed_form import ridge_map_update, second_moment
from lit_unlearn.core.uce import (
    SharedReport,
    map_condition,
    map_report,
    map_updates,
    shared_map,
    shifted_by_attributes,
    without_component,
)

D_IN = 12
WIDTHS = (5, 8, 5, 3)
"""Outputs of the matrices, which differ as in a UNet."""


WEIGHTS = [normal(width, D_IN, seed=number) for number, width in enumerate(WIDTHS)]
KEYS, GUIDES, PRESERVED = normal(6, D_IN, seed=10), normal(6, D_IN, seed=11), normal(9, D_IN, seed=12)
TARGETS = [GUIDES @ weight.mT for weight in WEIGHTS]
SCALES: dict[str, float] = {"erase_scale": 0.7, "preserve_scale": 1.9, "lamb": 0.4}


def published(weight: Tensor, targets: Tensor, erase_scale: float, preserve_scale: float, lamb: float) -> Tensor:
    """The formula as printed, summed over concepts, with columns as samples."""
    left, right = lamb * weight, lamb * torch.eye(D_IN, dtype=torch.float64)
    for c, v in zip(KEYS, targets, strict=True):
        left = left + erase_scale * torch.outer(v, c)
        right = right + erase_scale * torch.outer(c, c)
    for c in PRESERVED:
        left = left + preserve_scale * torch.outer(weight @ c, c)
        right = right + preserve_scale * torch.outer(c, c)
    return left @ torch.linalg.inv(right)


def test_every_matrix_gets_the_published_formula() -> None:
    deltas = map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), **SCALES)
    for weight, targets, delta in zip(WEIGHTS, TARGETS, deltas, strict=True):
        assert delta.abs().max() > 0.1
        assert_close(weight + delta, published(weight, targets, **SCALES), rtol=0, atol=1e-10)


def test_the_condition_is_that_of_the_published_system() -> None:
    system = SCALES["lamb"] * torch.eye(D_IN, dtype=torch.float64)
    system = system + SCALES["erase_scale"] * KEYS.mT @ KEYS + SCALES["preserve_scale"] * PRESERVED.mT @ PRESERVED
    expected = torch.linalg.cond(system).item()
    assert map_condition(KEYS, second_moment(PRESERVED), **SCALES) == pytest.approx(expected, rel=1e-10)
    alone = (KEYS.mT @ KEYS + 0.5 * torch.eye(D_IN, dtype=torch.float64)).double()
    assert map_condition(KEYS) == pytest.approx(torch.linalg.cond(alone).item(), rel=1e-10)
    assert map_condition(KEYS) != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("scales", [{}, SCALES, {"lamb": 1e-3}, {"preserve_scale": 0.0}])
def test_all_at_once_equals_one_at_a_time(scales: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[Any, ...]] = []
    solve = least_squares_system.cholesky_factor
    monkeypatch.setattr(least_squares_system, "cholesky_factor", lambda *args: solved.append(args) or solve(*args))
    deltas = map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), **scales)
    assert len(solved) == 1  # one factorisation
    for weight, targets, delta in zip(WEIGHTS, TARGETS, deltas, strict=True):
        alone = ridge_map_update(weight, KEYS, targets, PRESERVED, **scales)
        assert_close(weight + delta, alone, rtol=0, atol=1e-10)


def test_nothing_preserved_is_as_preserving_with_no_weight() -> None:
    assert_close(
        map_updates(WEIGHTS, KEYS, TARGETS), map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), 1.0, 0.0)
    )


def test_several_concepts_are_edited_by_one_solve() -> None:
    """Each concept's rows reach their targets as well as when it is edited alone."""
    together = map_updates(WEIGHTS, KEYS, TARGETS, lamb=1e-8)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        for weight, targets, delta in zip(WEIGHTS, TARGETS, together, strict=True):
            outputs = KEYS[rows] @ (weight + delta).mT
            # The keys are linearly independent, so with a vanishing ridge all of them are met.
            assert_close(outputs, targets[rows], rtol=0, atol=1e-6)
            assert (KEYS[rows] @ weight.mT - targets[rows]).abs().max() > 0.1
    one = map_updates(WEIGHTS, KEYS[:2], [targets[:2] for targets in TARGETS], lamb=1e-8)
    # Not a sum of edits: the second concept's keys are moved by the first one's edit too.
    assert (KEYS[2:] @ one[0].mT).abs().max() > 1e-2


def test_the_weights_stay_as_lambda_grows() -> None:
    norms = []
    for lamb in (1e0, 1e3, 1e6):
        deltas = map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), lamb=lamb)
        norms.append(float(torch.cat(deltas).norm()))
    assert norms[0] > 1
    # The update is s_e R^T K / lamb + O(lamb^-2).
    expected = torch.cat([(t - KEYS @ w.mT).mT @ KEYS for w, t in zip(WEIGHTS, TARGETS, strict=True)]).norm() / 1e6
    assert norms[2] == pytest.approx(float(expected), rel=1e-3)
    assert norms[1] > 100 * norms[2]


def test_a_heavy_preserve_scale_keeps_the_preserved_outputs() -> None:
    def leak(preserve_scale: float) -> float:
        deltas = map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), 1.0, preserve_scale)
        return max(float((PRESERVED @ delta.mT).abs().max()) for delta in deltas)

    assert leak(1e10) < 1e-7
    assert leak(1.0) > 1e-1
    # Three of the twelve directions are free of preserved keys: there the edit goes on.
    assert map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED), 1.0, 1e10)[0].norm() > 0.1


def test_the_report_measures_what_it_says() -> None:
    weight, targets = WEIGHTS[0], TARGETS[0]
    delta = map_updates(WEIGHTS, KEYS, TARGETS, second_moment(PRESERVED))[0]
    report = map_report(weight, delta, KEYS, targets, second_moment(PRESERVED))
    edited = weight + delta
    assert report == pytest.approx(
        {
            "relative_norm": float(delta.norm() / weight.norm()),
            "residual_before": float((KEYS @ weight.mT - targets).norm() / targets.norm()),
            "residual": float((KEYS @ edited.mT - targets).norm() / targets.norm()),
            "leak": float((PRESERVED @ delta.mT).norm() / (PRESERVED @ weight.mT).norm()),
        },
        rel=1e-9,
    )
    assert report["residual"] < report["residual_before"]
    assert "leak" not in map_report(weight, delta, KEYS, targets)


def test_the_technique_tensor_takes_out_what_a_phrase_already_has() -> None:
    outputs, goal = KEYS @ WEIGHTS[0].mT, TARGETS[0]
    phrases = torch.tensor([0, 0, 0, 1, 2, 2])
    targets = without_component(goal, outputs, phrases)
    for phrase in range(3):
        rows = phrases == phrase
        before = float((goal[rows] * outputs[rows]).sum())
        assert abs(before) > 1e-2
        assert abs(float((targets[rows] * outputs[rows]).sum())) < 1e-12 * abs(before) + 1e-12
        # As in the code of 2023: the unit vector is that of all positions together.
        unit = outputs[rows] / outputs[rows].norm()
        assert_close(targets[rows], goal[rows] - (unit * goal[rows]).sum() * unit, rtol=0, atol=1e-12)


def test_attributes_are_added_to_the_phrases_own_outputs() -> None:
    outputs, attributes = KEYS @ WEIGHTS[0].mT, torch.stack([normal(6, 5, seed=20), 7 * normal(6, 5, seed=21)])
    phrases, alphas = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[0.5, -0.2], [0.0, 0.3]])
    for normalised in (True, False):
        targets = shifted_by_attributes(outputs, attributes, alphas, phrases, normalised)
        for phrase, rows in enumerate((slice(0, 3), slice(3, 6))):
            expected = outputs[rows].clone()
            for alpha, attribute in zip(alphas[phrase].tolist(), attributes, strict=True):
                size = outputs[rows].norm() / attribute[rows].norm() if normalised else 1.0
                expected += alpha * size * attribute[rows]
            assert_close(targets[rows], expected, rtol=0, atol=1e-6)  # alphas of float32
    assert torch.equal(shifted_by_attributes(outputs, attributes, alphas * 0, phrases), outputs)


# --- one map for all matrices


@pytest.mark.parametrize("count", [1, 5, 6, 40])
@pytest.mark.parametrize("scales", [{}, SCALES])
def test_with_the_outputs_of_other_states_as_targets_one_map_changes_all_matrices(
    count: int, scales: dict[str, float]
) -> None:
    keys, guides, moment = normal(count, D_IN, seed=10), normal(count, D_IN, seed=11), second_moment(PRESERVED)
    found = shared_map(keys, guides, moment, **scales)
    expected = map_updates(WEIGHTS, keys, [guides @ weight.mT for weight in WEIGHTS], moment, **scales)
    for weight, delta in zip(WEIGHTS, expected, strict=True):
        assert delta.norm() > 1e-2 * weight.norm()
        assert (found.change(weight) - delta).norm() <= 1e-12 * delta.norm()
        assert (weight @ found.matrix - delta).norm() <= 1e-12 * delta.norm()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_shared_map_has_one_dimension_for_each_state(count: int) -> None:
    """So the edit is a LoRA of that rank, and nothing is left out: up W (C* - C), down C^T S^-1."""
    found = shared_map(KEYS[:count], GUIDES[:count], second_moment(PRESERVED))
    assert found.right is not None
    assert found.left.shape == (D_IN, count)
    assert int(torch.linalg.matrix_rank(found.matrix)) == count
    assert shared_map(KEYS, GUIDES).right is None  # six states of twelve inputs: the square matrix costs less


@pytest.mark.parametrize(("count", "direct"), [(2, True), (40, False)])
@pytest.mark.parametrize("preserved", ["keys", "moment", "nothing"])
def test_the_shared_report_is_that_of_each_matrix(count: int, direct: bool, preserved: str) -> None:
    keys, guides = normal(count, D_IN, seed=10), normal(count, D_IN, seed=11)
    kept = PRESERVED[:3] if preserved == "keys" else PRESERVED
    moment = None if preserved == "nothing" else second_moment(kept)
    found = shared_map(keys, guides, moment)
    report = SharedReport(keys, guides, moment, kept if preserved == "keys" else None)
    assert report.direct is direct or preserved == "moment"
    for weight in WEIGHTS:
        delta = found.change(weight).float().double()  # rounded, so that it is not exactly W B
        expected = map_report(weight, delta, keys, guides @ weight.mT, moment)
        assert report.of(weight, delta) == pytest.approx(expected, rel=1e-10)


def test_a_shared_map_refuses_what_cannot_be_solved() -> None:
    with pytest.raises(ValueError, match="keys is empty"):
        shared_map(KEYS[:0], GUIDES[:0])
    with pytest.raises(ValueError, match=r"guides has shape \(2, 12\), expected \(6, 12\)"):
        shared_map(KEYS, GUIDES[:2])
    with pytest.raises(ValueError, match="system is singular with ridge=0"):
        shared_map(KEYS, GUIDES, lamb=0.0)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 4\), expected \(\*, 12\)"):
        shared_map(KEYS, GUIDES).change(WEIGHTS[0][:, :4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"erase_scale": 0.0}, r"erase_scale=0.0 must be a positive number"),
        ({"erase_scale": float("nan")}, "erase_scale=nan must be"),
        ({"preserve_scale": -1.0}, r"preserve_scale=-1.0 must be a finite number, zero or larger"),
        ({"lamb": -0.5}, r"lamb=-0.5 must be"),
        ({"lamb": 0.0}, "system is singular with ridge=0"),
        ({"targets": TARGETS[1:]}, "3 targets for 4 weights"),
        ({"targets": [TARGETS[0]] * 4}, r"targets has shape \(6, 5\), expected \(6, 8\)"),
        ({"weights": [WEIGHTS[0][:, :4], *WEIGHTS[1:]]}, r"weight has shape \(5, 4\), expected \(\*, 12\)"),
        ({"keys": KEYS[:0], "targets": [t[:0] for t in TARGETS]}, "keys is empty"),
    ],
)
def test_what_cannot_be_solved(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_updates(**{"weights": WEIGHTS, "keys": KEYS, "targets": TARGETS, **arguments})
