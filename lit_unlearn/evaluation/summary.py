"""Many runs as one row per method: averages over the edited concepts, with intervals that resample concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from lit_unlearn.evaluation.metrics import harmonic_mean
from lit_unlearn.evaluation.scores import Measurement, Scores

SCORE_NAMES = ("forget", "forget_direct", "forget_indirect", "adversarial", "retain", "adjacent")
"""Scores that are averaged over runs."""


OWN_INTERVALS = {"adversarial": "forget_adversarial"}
"""Names of intervals in a run's scores, where they differ."""


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    rows: np.ndarray,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic`` over resampled rows (Efron, 1979).

    A row is one run, so pictures of one concept, which fail together, are drawn together.

    Args:
        statistic: From rows (n, columns) to a number.
        rows: What is resampled, (n, columns), one row per run.
        resamples: Draws with replacement.
        confidence: Of the interval.
        seed: Of the draws.

    Returns:
        Lower and upper bound.
    """
    places = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    draws = [statistic(rows[place]) for place in places]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A method's runs, each with other concepts or another seed, summed up.

    Attributes:
        method: Name of the recipe's method.
        runs: How many runs.
        scores: ``SCORE_NAMES`` to their average over runs; those that no run has are left out.
        hm_of_averages: Harmonic mean of the average forget and the average retain score (the paper's).
        average_of_hms: Average of the runs' harmonic means; a concept that stays counts 0.
        least_hm: Harmonic mean of the worst run.
        err: Average of the challenge's harmonic mean of five; None if no run has it.
        intervals: Name of a score above to its bounds, at 95 %: runs resampled, or a single run's own intervals.
        drift: Average root-mean-square difference of other concepts' pictures, parts of full scale.
        costs: ``seconds``, ``unet_forwards``, ``unet_backwards``, ``peak_memory_bytes`` and what the edit reports as
            ``weight_change_ratio`` and ``weight_change_norm``, averages.
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
    """Sum up runs of one method.

    Args:
        runs: Runs of one method and one protocol.
        before: Sum up the unedited model's scores on the same pictures instead, as the method ``unedited``.

    Raises:
        ValueError: No runs, several methods, or a run in which no picture of the edited or of other concepts was
            judged.
    """
    if not runs:
        raise ValueError("There are no scores to summarise.")
    methods = sorted({run.method for run in runs})
    if len(methods) > 1 and not before:
        raise ValueError(f"Runs of several methods ({', '.join(methods)}) are summed up one method at a time.")
    measurements: list[Measurement] = [run.before or run for run in runs] if before else list(runs)
    columns = {name: [_score(m, name) for m in measurements] for name in SCORE_NAMES}
    for name in ("forget", "retain"):
        if None in columns[name]:
            run = runs[columns[name].index(None)]
            raise ValueError(f"The run of {run.method} on {', '.join(run.edited)} has no {name} score: test it again.")
    complete = {name: [v for v in values if v is not None] for name, values in columns.items()}
    scores = {name: fmean(values) for name, values in complete.items() if values}
    pairs = np.array(list(zip(complete["forget"], complete["retain"], strict=True)))
    each = [harmonic_mean(float(f), float(r)) for f, r in pairs]
    intervals = {
        name: bootstrap_interval(lambda rows: float(rows.mean()), np.array(values)[:, None])
        for name, values in complete.items()
        if values
    }
    intervals["hm_of_averages"] = bootstrap_interval(
        lambda rows: harmonic_mean(float(rows[:, 0].mean()), float(rows[:, 1].mean())), pairs
    )
    intervals["average_of_hms"] = bootstrap_interval(lambda rows: float(rows.mean()), np.array(each)[:, None])
    errs = [m.err for m in measurements if m.err is not None]
    if errs:
        intervals["err"] = bootstrap_interval(lambda rows: float(rows.mean()), np.array(errs)[:, None])
    if len(runs) == 1:  # nothing to resample: the run's own intervals, of its pictures
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
        average_of_hms=fmean(each),
        least_hm=min(each),
        err=fmean(errs) if errs else None,
        intervals=intervals,
        drift=0.0 if before else fmean(drifts) if drifts else None,
        costs={} if before else _costs(runs),
    )


def summaries_markdown(summaries: Sequence[MethodSummary]) -> str:
    """Markdown: a table of scores with intervals, then a table of side effects and costs; a row per method."""
    with_intervals = ("forget", "forget_direct", "forget_indirect", "adversarial", "retain", "adjacent")
    lines = [
        "| method | runs | forget | direct | indirect | adversarial | retain | adjacent | HM of averages "
        "| average of HMs | least HM | ERR |",
        "| --- | ---: | " + " | ".join(["---:"] * 10) + " |",
    ]
    for summary in summaries:
        cells = [summary.method, str(summary.runs)]
        cells += [_cell(summary.scores.get(name), summary.intervals.get(name)) for name in with_intervals]
        cells.append(_cell(summary.hm_of_averages, summary.intervals.get("hm_of_averages")))
        cells.append(_cell(summary.average_of_hms, summary.intervals.get("average_of_hms")))
        cells += [f"{summary.least_hm:.3f}", _cell(summary.err, summary.intervals.get("err"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| method | drift | weight change, relative | weight change, norm | seconds | UNet forwards | of them backward "
        "| peak memory, MB |",
        "| --- | " + " | ".join(["---:"] * 7) + " |",
    ]
    for summary in summaries:
        if not summary.costs:
            continue
        costs = summary.costs
        cells = [summary.method, "-" if summary.drift is None else f"{summary.drift:.4f}"]
        for name, form in (("weight_change_ratio", ".4f"), ("weight_change_norm", ".2f"), ("seconds", ".1f")):
            cells.append(f"{costs[name]:{form}}" if name in costs else "-")
        for name, scale in (("unet_forwards", 1), ("unet_backwards", 1), ("peak_memory_bytes", 1e6)):
            cells.append(f"{costs[name] / scale:.0f}" if name in costs else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        for name in ("weight_change_ratio", "weight_change_norm"):
            if name in run.edit:
                found.setdefault(name, []).append(run.edit[name])
    return {name: fmean(values) for name, values in found.items()}


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
