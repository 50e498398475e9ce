"""Summarises runs in one row per method: averages over the edited concepts, with intervals from resampled concepts.

Runs that edit the same concepts differ in a seed: the seed of the fit or the seed of the pictures. They count as one in
averages, and ``seed_spreads`` measures how much they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

import numpy as np

from lit_unlearn.evaluation.metrics import harmonic_mean
from lit_unlearn.evaluation.scores import OWN_INTERVALS, Measurement, Scores

SCORE_NAMES = (
    *("forget", "forget_direct", "forget_indirect", "adversarial", "crosswise"),
    *("retain", "adjacent", "spontaneous"),
)
"""Scores that are averaged over runs."""
OPTIONAL = ("crosswise", "spontaneous")
"""Scores that have no column if no run has them."""
OF_EDIT = ("weight_change_ratio", "weight_change_norm", "reach")
"""Numbers of the edit's report that are averaged over runs."""


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    rows: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic`` over resampled rows (Efron, 1979), clusters first (Davison & Hinkley, 1997).

    A row is one run, so the pictures of a concept, which are not independent, are drawn together; a cluster consists of
    the runs of the same concepts with different seeds. If there is only one cluster, its rows are drawn.

    Args:
        statistic: Maps rows (clusters, columns), each the mean of the drawn rows of a cluster, to a number.
        rows: The rows to resample, (n, columns), one per run.
        clusters: The cluster of each row; None makes each row its own cluster.
        resamples: Number of draws with replacement.
        confidence: Confidence of the interval.
        seed: Seed of the draws.

    Returns:
        Lower and upper bound.
    """
    generator = np.random.default_rng(seed)
    if clusters is None or len(set(clusters)) == len(rows):
        places = generator.integers(len(rows), size=(resamples, len(rows)))
        draws = [statistic(rows[place]) for place in places]
    else:
        found = [rows[[c == cluster for c in clusters]] for cluster in dict.fromkeys(clusters)]
        draws = []
        for chosen in generator.integers(len(found), size=(resamples, len(found))):
            drawn = [found[i][generator.integers(len(found[i]), size=len(found[i]))].mean(axis=0) for i in chosen]
            draws.append(statistic(np.stack(drawn)))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """Summary of a method's runs, which differ in concepts or seeds.

    Attributes:
        method: Name of the recipe's method.
        runs: Number of runs.
        scores: For each of ``SCORE_NAMES`` its average over sets of concepts; scores that no run has are left out.
        hm_of_averages: Harmonic mean of the average forget and the average retain score (as in the paper).
        average_of_hms: Average of the runs' harmonic means; a concept that is not forgotten counts 0.
        least_hm: Harmonic mean of the worst run.
        err: Average of the challenge's harmonic mean of five scores; None if no run has it.
        intervals: For each score above its bounds at 95 %: from resampled runs, or the intervals of a single run.
        drift: Average root-mean-square difference of other concepts' pictures, as a share of full scale.
        costs: Averages of ``seconds``, ``unet_forwards``, ``unet_backwards``, ``peak_memory_bytes``, and of
            ``OF_EDIT`` from the edit's report.
    """

    method: str
    runs: int
    scores: dict[str, float]
    hm_of_averages: float
    average_of_hms: float
    least_hm: float
    err: float | None
    intervals: dict[str, tuple[float, float]]
    drift: float | None = None
    costs: dict[str, float] = field(default_factory=dict)


def summarise(runs: Sequence[Scores], before: bool = False) -> MethodSummary:
    """Summarise the runs of one method.

    Args:
        runs: Runs of one method and one protocol.
        before: Summarise the unedited model's scores on the same pictures instead, as the method ``unedited``.

    Raises:
        ValueError: There are no runs, or several methods, or a run without judged pictures of the edited or of the
            other concepts.
    """
    if not runs:
        raise ValueError("There are no scores to summarise.")
    methods = sorted({run.method for run in runs})
    if len(methods) > 1 and not before:
        raise ValueError(f"Runs of several methods ({', '.join(methods)}) are summed up one method at a time.")
    measurements: list[Measurement] = [run.before or run for run in runs] if before else list(runs)
    clusters = [tuple(run.edited) for run in runs]
    columns = {name: [_score(m, name) for m in measurements] for name in SCORE_NAMES}
    for name in ("forget", "retain"):
        if None in columns[name]:
            run = runs[columns[name].index(None)]
            raise ValueError(f"The run of {run.method} on {', '.join(run.edited)} has no {name} score: test it again.")
    columns |= {
        "hm": [harmonic_mean(m.forget or 0.0, m.retain or 0.0) for m in measurements],
        "err": [m.err for m in measurements],
    }
    scores, intervals = {}, {}
    for name, values in columns.items():
        judged = [(value, c) for value, c in zip(values, clusters, strict=True) if value is not None]
        if judged:
            rows, of_rows = np.array([[value] for value, _ in judged]), [cluster for _, cluster in judged]
            scores[name] = float(_cluster_means(rows, of_rows).mean())
            intervals[name] = bootstrap_interval(lambda rows: float(rows.mean()), rows, of_rows)
    pairs = np.array([[m.forget, m.retain] for m in measurements])
    intervals["hm_of_averages"] = bootstrap_interval(
        lambda rows: harmonic_mean(float(rows[:, 0].mean()), float(rows[:, 1].mean())), pairs, clusters
    )
    average_of_hms, err = scores.pop("hm"), scores.pop("err", None)
    intervals["average_of_hms"] = intervals.pop("hm")
    if len(runs) == 1:  # nothing to resample, so take the run's own intervals
        own = measurements[0].intervals
        intervals = {
            name: own[OWN_INTERVALS.get(name, name)] for name in scores if OWN_INTERVALS.get(name, name) in own
        }
        if "harmonic_mean" in own:
            intervals["hm_of_averages"] = intervals["average_of_hms"] = own["harmonic_mean"]
    drifts = [run.drift["rmse"] for run in runs if run.drift]
    return MethodSummary(
        method="unedited" if before else methods[0],
        runs=len(runs),
        scores=scores,
        hm_of_averages=harmonic_mean(scores["forget"], scores["retain"]),
        average_of_hms=average_of_hms,
        least_hm=min(hm for hm in columns["hm"] if hm is not None),
        err=err,
        intervals=intervals,
        drift=0.0 if before else fmean(drifts) if drifts else None,
        costs={} if before else _costs(runs),
    )


def summaries_markdown(summaries: Sequence[MethodSummary]) -> str:
    """Markdown: a table of scores with intervals, then a table of side effects and costs; a row per method.

    The tables have columns for ``OPTIONAL`` scores and for the reach if a method has them.
    """
    known = {name for summary in summaries for name in summary.scores}
    with_intervals = [name for name in SCORE_NAMES if name in known or name not in OPTIONAL]
    heads = ["runs", *(name.removeprefix("forget_") for name in with_intervals)]
    heads += ["HM of averages", "average of HMs", "least HM", "ERR"]
    lines = [f"| method | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for summary in summaries:
        cells = [summary.method, str(summary.runs)]
        cells += [_cell(summary.scores.get(name), summary.intervals.get(name)) for name in with_intervals]
        cells.append(_cell(summary.hm_of_averages, summary.intervals.get("hm_of_averages")))
        cells.append(_cell(summary.average_of_hms, summary.intervals.get("average_of_hms")))
        cells += [f"{summary.least_hm:.3f}", _cell(summary.err, summary.intervals.get("err"))]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["drift", "weight change, relative", "weight change, norm", "seconds", "UNet forwards", "of them backward"]
    heads.append("peak memory, MB")
    numbers = {"weight_change_ratio": ".4f", "weight_change_norm": ".2f", "seconds": ".1f"}
    if any("reach" in summary.costs for summary in summaries):
        heads.insert(1, "reach")
        numbers = {"reach": ".3f", **numbers}
    lines += ["", f"| method | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for summary in summaries:
        if not summary.costs:
            continue
        costs = summary.costs
        cells = [summary.method, "-" if summary.drift is None else f"{summary.drift:.4f}"]
        for name, form in numbers.items():
            cells.append(f"{costs[name]:{form}}" if name in costs else "-")
        for name, scale in (("unet_forwards", 1), ("unet_backwards", 1), ("peak_memory_bytes", 1e6)):
            cells.append(f"{costs[name] / scale:.0f}" if name in costs else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SeedSpread:
    """How much the scores of runs differ that have all but one seed in common.

    Attributes:
        seeds: Largest number of seeds of a set of concepts.
        deviations: For each score the standard deviation between seeds: the root of the mean unbiased variance, over
            sets of concepts with at least two seeds.
    """

    seeds: int
    deviations: dict[str, float]


def seed_spreads(runs: Sequence[Scores]) -> dict[str, SeedSpread]:
    """Spread between training seeds (for the same seed of pictures), and between evaluation seeds (for the same edit).

    Args:
        runs: Runs of one method.

    Returns:
        The spread for ``training`` and for ``evaluation``; left out if no two runs differ only in that seed.
    """
    found = {}
    for kind, own, other in (("training", "training_seed", "seed"), ("evaluation", "seed", "training_seed")):
        groups: dict[Hashable, dict[Hashable, Scores]] = {}
        for run in runs:
            groups.setdefault((*run.edited, getattr(run, other)), {})[getattr(run, own)] = run
        several = [list(group.values()) for group in groups.values() if len(group) > 1]
        if several:
            deviations = {}
            for name in ("forget", "retain", "adjacent", "adversarial"):
                values = [[v for run in group if (v := _score(run, name)) is not None] for group in several]
                variances = [variance(of_group) for of_group in values if len(of_group) > 1]
                if variances:
                    deviations[name] = fmean(variances) ** 0.5
            found[kind] = SeedSpread(max(map(len, several)), deviations)
    return found


def seeds_markdown(runs: Sequence[Scores]) -> str:
    """Markdown: mean and spread by training seed and by evaluation seed; empty if no runs differ only in a seed."""
    of_methods: dict[str, list[Scores]] = {}
    for run in runs:
        of_methods.setdefault(run.method, []).append(run)
    lines = []
    for method, of_method in of_methods.items():
        summary, spreads = summarise(of_method), seed_spreads(of_method)
        cells = [method]
        for kind in ("training", "evaluation"):
            spread = spreads.get(kind)
            cells.append(str(spread.seeds) if spread else "-")
            for name in ("forget", "retain"):
                value = spread.deviations.get(name) if spread else None
                cells.append("-" if value is None else f"{summary.scores[name]:.3f} ± {value:.3f}")
        if spreads:
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    head = "| method | training seeds | forget | retain | evaluation seeds | forget | retain |"
    return "\n".join([head, "| --- |" + " ---: |" * 6, *lines]) + "\n"


def _cluster_means(rows: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Mean row (clusters, columns) of each cluster of ``rows`` (n, columns)."""
    return np.stack([rows[[c == cluster for c in clusters]].mean(axis=0) for cluster in dict.fromkeys(clusters)])


def _score(measurement: Measurement, name: str) -> float | None:
    if name.startswith("forget_"):
        return getattr(measurement, name.removeprefix("forget_")).forget
    return getattr(measurement, name)


def _costs(runs: Sequence[Scores]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.cost:
            for name in ("seconds", "unet_forwards", "unet_backwards", "peak_memory_bytes"):
                if (value := getattr(run.cost, name)) is not None:
                    found.setdefault(name, []).append(value)
        for name in OF_EDIT:
            if name in run.edit:
                found.setdefault(name, []).append(run.edit[name])
    return {name: fmean(values) for name, values in found.items()}


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
