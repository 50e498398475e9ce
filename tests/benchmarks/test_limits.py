"""Rank correlations of reported limits with the success of attacks, on made-up runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import limits
import numpy as np
import pytest
import torch
from limits import EVERY, Correlation, correlate, correlations, main, ranks, spearman
from torchmetrics.functional import spearman_corrcoef

from lit_unlearn.evaluation.scores import ConceptScore, Measurement, Part, Scores, Source
from lit_unlearn.reports.attack_results import AttackReport, make_result
from lit_unlearn.reports.report import collect

CONCEPTS = ["dog", "cat", "owl", "rain", "sketch"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAWS", 300)


def save(root: Path, method: str, concept: str, reach: float | None, unasked: float, **shown: int) -> None:
    """A run whose edit has a reach and a spontaneous rate, and attacks that brought back so many of ten pictures."""
    folder = root / method / concept / "version_0"

    def measured(share: float | None) -> dict[str, Any]:
        per_concept = {concept: ConceptScore(0.0, 10, 0, True, share_spontaneous=share)}
        score = {"forget": 1.0, "retain": 1.0, "harmonic_mean": 1.0, "intervals": {}, "per_concept": per_concept}
        return {**score, "direct": Part(1.0, 1.0), "indirect": Part(1.0, 1.0), "spontaneous": share}

    layers = {} if reach is None else {"a": {"reach": reach}, "b": {"reach": 1.0}, "c": {"leak": 0.1}}
    Scores(
        **measured(unasked / 2), method=method, backbone=Source("m"), concepts=Source("set", "aa"), edited=[concept],
        judge="j", images_per_concept=10, seed=0, before=Measurement(**measured(unasked)),
        edit={"layers": layers, **({} if reach is None else {"reach": reach})},
    ).save(folder / "scores.json")  # fmt: skip
    attacks = []
    for attack, number in shown.items():
        verdicts = {"pre_attack": [False], "shown": [True] * number + [False] * (10 - number), "unedited": [True]}
        attacks.append(
            make_result(
                verdicts=verdicts,
                attack=attack,
                concept=concept,
                pictures=10,
                seconds=1.0,
                unet_forwards=1,
                unet_backwards=0,
                found="a token",
            )
        )
    if attacks:
        report = AttackReport(method=method, concepts=[concept], checkpoint="last.ckpt", attacks=attacks)
        report.save(folder / "attacks.json")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two methods on five concepts: the farther the reach, the fewer pictures a token brings back."""
    root = tmp_path / "logs"
    for number, concept in enumerate(CONCEPTS):
        for method, more in (("uce", 0), ("null_space", 1)):
            reach, back = 0.1 * number + 0.05 * more, 9 - 2 * number - more
            save(root, method, concept, reach, unasked=0.1 * number, inversion=back, search=3)
    save(root, "esd", "dog", None, 0.4, inversion=10)
    save(root, "uce", "spare", 0.9, 0.0)  # not attacked
    return root


def test_ranks_of_ties_are_means_and_the_correlation_is_spearman_s() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]
    generator = np.random.default_rng(0)
    for decimals in (0, 6):
        first, second = (generator.normal(size=40).round(decimals) for _ in range(2))
        second += first
        expected = spearman_corrcoef(torch.tensor(first), torch.tensor(second))
        assert spearman(first, second) == pytest.approx(float(expected), abs=1e-6)
    assert math.isnan(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])))


def test_a_reach_that_tells_the_success_and_one_that_does_not(logs: Path) -> None:
    found = correlations([run for run in collect([logs]) if run.attacks])
    told = found["inversion", "reach"]
    assert (told.edits, told.concepts, told.value) == (10, 5, pytest.approx(-1))
    assert told.interval == (pytest.approx(-1), pytest.approx(-1)) and told.p < 0.01
    assert found["inversion", "mean reach"] == told  # the second map's is the same for all
    assert found["inversion", "spontaneous, before"].edits == 11  # also the edit without a reach
    assert found["inversion", "spontaneous, after"].value == found["inversion", "spontaneous, before"].value
    # A search that always brings back three pictures is correlated with nothing.
    same = found["search", "reach"]
    assert math.isnan(same.value) and math.isnan(same.p) and all(map(math.isnan, same.interval))
    assert found[EVERY, "reach"].value == pytest.approx(-1)


def test_intervals_draw_concepts_and_chance_is_seen() -> None:
    generator = np.random.default_rng(1)
    measure, success = generator.normal(size=(2, 24)).tolist()
    chance = correlate(measure, success, range(24))
    assert chance.p > 0.05 and chance.interval[0] < chance.value < chance.interval[1]
    assert chance == correlate(measure, success, range(24))
    # Twelve copies of two edits are two concepts: a draw of one of them alone has no correlation.
    copies = correlate([0.1, 0.9] * 12, [0.8, 0.2] * 12, ["dog", "cat"] * 12)
    assert (copies.edits, copies.concepts, copies.value) == (24, 2, pytest.approx(-1))
    alone = correlate([0.1, 0.5, 0.4, 0.9], [1.0, 0.5, 0.6, 0.0], ["dog"] * 4)
    assert isinstance(alone, Correlation) and alone.concepts == 1 and alone.interval[0] == pytest.approx(-1)


def test_the_command_writes_tables_over_all_edits_and_each_method(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["limits.py", str(logs), "-o", str(tmp_path / "limits.md")])
    main()
    text = (tmp_path / "limits.md").read_text(encoding="utf-8")
    assert "11 attacked edits (methods: esd, null_space, uce)" in text
    assert "| inversion | reach | 10 | 5 | -1.00 (-1.00 to -1.00) | 0.003 |" in text
    assert "| search | reach | 10 | 5 | - | - |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## All methods",
        "## null_space",
        "## uce",
    ]
    monkeypatch.setattr(sys, "argv", ["limits.py", str(logs / "uce")])
    main()
    assert "5 attacked edits (methods: uce)" in capsys.readouterr().out
    for folder, said in (
        (logs / "esd", "1 of the runs have attacks and report"),
        (tmp_path / "no", "there is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["limits.py", str(folder)])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
