from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lit_unlearn.evaluation.metrics import both_harmonic_means
from lit_unlearn.evaluation.scores import Cost, Measurement, Part, Scores, Source
from lit_unlearn.reports.summary import (
    bootstrap_interval,
    seed_spreads,
    seeds_markdown,
    summaries_markdown,
    summarise,
)


def run(forget: float, retain: float, concept: str = "dog", method: str = "esd", err: float | None = 0.5) -> Scores:
    common = {"intervals": {}, "direct": Part(forget, retain), "indirect": Part(forget / 2, retain), "per_concept": {}}
    before = Measurement(forget=0.0, retain=1.0, harmonic_mean=0.0, **common)
    return Scores(
        forget=forget, retain=retain, harmonic_mean=None, **common, adjacent=retain / 2, adversarial=0.25, err=err,
        method=method, backbone=Source("m"), concepts=Source("set"), edited=[concept], judge="j",
        images_per_concept=10, seed=0, before=before, cost=Cost(10.0, 100, 10**9, 20),
        edit={"weight_change_ratio": 0.5, "weight_change_norm": 2.0}, drift={"rmse": 0.02, "pictures": 9},
    )  # fmt: skip


RUNS = [run(1.0, 0.8, "dog"), run(0.0, 1.0, "cat"), run(0.5, 0.9, "owl")]


def test_averages_and_both_harmonic_means() -> None:
    summary = summarise(RUNS)
    assert summary.scores["forget"] == pytest.approx(0.5)
    assert summary.scores["forget_indirect"] == pytest.approx(0.25)
    assert summary.scores["retain"] == pytest.approx(0.9)
    assert summary.scores["adjacent"] == pytest.approx(0.45)
    expected = both_harmonic_means([1.0, 0.0, 0.5], [0.8, 1.0, 0.9])
    assert (summary.hm_of_averages, summary.average_of_hms) == pytest.approx(expected)
    assert (summary.least_hm, summary.err, summary.drift) == (0.0, 0.5, 0.02)
    assert summary.costs["unet_backwards"] == 20
    assert summary.costs["weight_change_norm"] == 2.0


def test_the_unedited_model_is_summed_up_from_what_the_runs_saw_before() -> None:
    summary = summarise([*RUNS, run(1.0, 1.0, method="uce")], before=True)
    assert (summary.method, summary.runs) == ("unedited", 4)
    assert (summary.scores["forget"], summary.scores["retain"], summary.err) == (0.0, 1.0, None)


def test_intervals_hold_the_score_and_resample_runs() -> None:
    summary = summarise(RUNS)
    for name, value in {**summary.scores, "hm_of_averages": summary.hm_of_averages}.items():
        low, high = summary.intervals[name]
        assert low <= value <= high, name
    # Three runs of which one has 0 and one has 1: the average of a resample can be either.
    assert summary.intervals["forget"] == (0.0, 1.0)


def test_a_single_run_keeps_its_own_intervals() -> None:
    own = {"forget": (0.3, 0.7), "retain": (0.8, 0.95), "harmonic_mean": (0.4, 0.8), "forget_adversarial": (0.1, 0.5)}
    summary = summarise([dataclasses.replace(run(0.5, 0.9), intervals=own)])
    assert summary.intervals["forget"] == (0.3, 0.7)
    assert summary.intervals["adversarial"] == (0.1, 0.5)
    assert summary.intervals["hm_of_averages"] == (0.4, 0.8)
    assert "err" not in summary.intervals


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    rows = np.random.default_rng(1).normal(size=(400, 1))
    low, high = bootstrap_interval(lambda r: float(r.mean()), rows, resamples=4000)
    half = 1.96 * rows.std() / 20
    assert (low, high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.1 * half)


def seeded_run(forget: float, concept: str, training_seed: int | None, seed: int) -> Scores:
    return dataclasses.replace(run(forget, 0.9, concept), training_seed=training_seed, seed=seed)


def test_more_seeds_of_a_concept_neither_weigh_more_nor_narrow_the_interval() -> None:
    one_seed = [run(1.0, 0.8, "dog"), run(0.0, 1.0, "cat"), run(0.5, 0.9, "owl")]
    many = [seeded_run(r.forget or 0.0, r.edited[0], s, 0) for r in one_seed for s in range(4 if r is RUNS[0] else 2)]
    many += [seeded_run(1.0, "dog", s, 0) for s in range(5, 9)]
    assert summarise(many).scores["forget"] == pytest.approx(0.5)
    assert summarise(many).intervals["forget"] == summarise(one_seed).intervals["forget"] == (0.0, 1.0)


def test_clusters_are_drawn_before_their_rows() -> None:
    # Between two clusters at 0 and 1 a resample is 0, 1/2 or 1, with probability 1/4, 1/2 and 1/4.
    rows = np.array([[0.0]] * 50 + [[1.0]] * 50)
    draws: list[float] = []
    bootstrap_interval(lambda r: draws.append(float(r.mean())) or draws[-1], rows, ["a"] * 50 + ["b"] * 50)
    assert set(draws) == {0.0, 0.5, 1.0}
    assert np.mean([draw == 0.5 for draw in draws]) == pytest.approx(0.5, abs=0.04)
    # A single cluster draws its rows.
    low, high = bootstrap_interval(lambda r: float(r.mean()), rows, ["a"] * 100)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)


def test_spread_by_training_seed_and_by_evaluation_seed_apart() -> None:
    runs = [
        *(seeded_run(forget, "dog", seed, 0) for seed, forget in enumerate([0.9, 1.0, 0.8])),
        seeded_run(0.5, "dog", 0, 1000),
        *(seeded_run(forget, "cat", seed, 0) for seed, forget in enumerate([0.2, 0.4])),
    ]
    spreads = seed_spreads(runs)
    assert spreads["training"].seeds == 3
    # Variances 0.01 (0.8, 0.9, 1.0) and 0.02 (0.2, 0.4).
    assert spreads["training"].deviations["forget"] == pytest.approx(0.015**0.5)
    assert spreads["evaluation"].seeds == 2
    assert spreads["evaluation"].deviations["forget"] == pytest.approx(0.08**0.5)
    assert spreads["training"].deviations["retain"] == 0.0
    row = seeds_markdown(runs).splitlines()[2]
    # Means: dog 0.8, cat 0.3.
    assert row == "| esd | 3 | 0.550 ± 0.122 | 0.900 ± 0.000 | 2 | 0.550 ± 0.283 | 0.900 ± 0.000 |"


def test_no_spread_without_two_runs_that_differ_in_one_seed() -> None:
    runs = [seeded_run(0.9, "dog", 0, 0), seeded_run(0.5, "dog", 1, 1000), seeded_run(0.5, "cat", 1, 0)]
    assert seed_spreads(runs) == {}
    assert seeds_markdown(runs) == ""
    # A method that draws nothing at random has evaluation seeds only.
    assert list(seed_spreads([seeded_run(0.9, "dog", None, 0), seeded_run(0.5, "dog", None, 1)])) == ["evaluation"]


def test_what_cannot_be_summed_up() -> None:
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
    with pytest.raises(ValueError, match=r"several methods \(esd, uce\)"):
        summarise([*RUNS, run(1.0, 1.0, method="uce")])
    with pytest.raises(ValueError, match="esd on dog has no forget score"):
        summarise([dataclasses.replace(run(0.5, 0.5), forget=None)])


def test_markdown_has_a_row_per_method_and_costs_of_edited_models_only() -> None:
    text = summaries_markdown([summarise(RUNS, before=True), summarise(RUNS)])
    scores, costs = text.split("\n\n")
    assert scores.splitlines()[3].startswith("| esd | 3 | 0.500 (0.00–1.00) | 0.500 ")
    assert [line.split(" | ")[0] for line in costs.splitlines()[2:]] == ["| esd"]
    assert costs.splitlines()[2] == "| esd | 0.0200 | 0.5000 | 2.00 | 10.0 | 100 | 20 | 1000 |"
    assert len({line.count("|") for line in scores.splitlines()}) == 1
