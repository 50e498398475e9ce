from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_unlearn.evaluation.judge_curve import Curve, JudgeCurves


def average_precision(answers: Tensor, labels: Tensor) -> float:
    """Σ (R_i − R_{i−1}) P_i over the thresholds, from the highest down, by counting."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(answers.tolist()), reverse=True):
        yes = answers >= threshold
        hits = int((yes & labels).sum())
        recall = hits / int(labels.sum())
        total += (recall - recall_before) * hits / int(yes.sum())
        recall_before = recall
    return total


def test_numbers_of_a_curve_equal_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(40, generator=generator) < 0.3
    answers = (0.4 * labels + 0.6 * torch.rand(40, generator=generator)).mul(20).round() / 20  # with ties
    numbers = Curve(answers, labels, failed=2).numbers()
    expected = average_precision(answers, labels)
    assert 0.5 < expected < 1
    assert numbers["average_precision"] == pytest.approx(expected, abs=1e-6)
    assert numbers["recall"] == pytest.approx(sum((answers >= 0.5)[labels].tolist()) / int(labels.sum()))
    assert numbers["false_yes"] == pytest.approx(sum((answers >= 0.5)[~labels].tolist()) / int((~labels).sum()))
    assert (numbers["positives"], numbers["negatives"], numbers["failed"]) == (
        int(labels.sum()),
        int((~labels).sum()),
        2,
    )


def test_a_perfect_and_a_useless_judge() -> None:
    labels = torch.tensor([True] * 3 + [False] * 9)
    assert Curve(labels.float(), labels).numbers()["average_precision"] == 1
    # One answer for all: precision is the share of positives, whatever the threshold.
    assert Curve(torch.full((12,), 0.7), labels).numbers()["average_precision"] == pytest.approx(0.25)


def test_pictures_of_one_sort_have_no_average_precision() -> None:
    numbers = Curve(torch.tensor([0.9, 0.1]), torch.tensor([True, True])).numbers()
    assert (numbers["average_precision"], numbers["false_yes"], numbers["recall"]) == (None, None, 0.5)
    empty = Curve(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).numbers()
    assert (empty["average_precision"], empty["recall"], empty["positives"]) == (None, None, 0)


def test_curves_do_not_depend_on_batches_order_and_repetition() -> None:
    answers = torch.tensor([0.9, 0.2, torch.nan, 0.6])
    labels = [True, False, False, True]
    whole, parts = JudgeCurves(["dog", "cat"], 6), JudgeCurves(["dog", "cat"], 6)
    whole.update("cat", [0, 2, 3, 5], answers, labels)
    for rows in ([3], [2, 1], [0, 3]):
        parts.update("cat", [[0, 2, 3, 5][row] for row in rows], answers[rows], [labels[row] for row in rows])
    for metric in (whole, parts):
        curve = metric.curves()["cat"]
        assert curve.answers.tolist() == pytest.approx([0.9, 0.2, 0.6])
        assert curve.labels.tolist() == [True, False, True]
        assert curve.failed == 1
        assert len(metric.curves()["dog"].answers) == 0


def test_replicas_add_up_by_their_maximum() -> None:
    whole = JudgeCurves(["dog"], 4)
    whole.update("dog", [0, 1, 2], torch.tensor([0.9, 0.2, torch.nan]), [True, False, False])
    ranks = [JudgeCurves(["dog"], 4) for _ in range(2)]
    ranks[0].update("dog", [0], torch.tensor([0.9]), [True])
    ranks[1].update("dog", [1, 2], torch.tensor([0.2, torch.nan]), [False, False])
    for name in ("answers", "labels"):
        assert whole._reductions[name] is torch.max or whole._reductions[name].__name__ == "dim_zero_max"  # type: ignore[union-attr]
        merged = torch.maximum(getattr(ranks[0], name), getattr(ranks[1], name))
        assert torch.equal(merged, getattr(whole, name))
