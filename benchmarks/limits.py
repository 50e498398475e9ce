"""Do the limits that an edit reports tell how often attacks succeed? Rank correlations over all edits that are found.

    python benchmarks/limits.py logs/uce logs/null_space -o docs/results/limits.md

Every folder is searched for ``scores.json`` with ``attacks.json`` beside it. Each such run is one edit. For every
attack, its success (share of pictures that show the concept, averaged over the attacked concepts) is compared with

- ``reach``: least over the edited maps of the median reach; a small one should mean more success;
- ``mean reach``: mean over the maps instead of the least;
- ``spontaneous, before``: share of the *unedited* model's pictures of retained prompts that show the concept unasked;
- ``spontaneous, after``: the same of the edited model.

The correlation is Spearman's. Its 95 % interval is a percentile bootstrap: edits of the same concepts by different
methods are alike, so concepts are drawn with replacement, each with all its edits. p is the share of 2000 permutations
of the success, over all edits, whose correlation is at least as far from zero.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lit_unlearn.reports.report import RunResult, collect
from lit_unlearn.system.files import atomic_write

DRAWS = 2000
"""Resamples of the interval, and permutations."""
FEWEST = 4
"""Fewest edits, and fewest edits of a method, that are correlated."""
EVERY = "all attacks, mean"


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of one measure with the success of one attack.

    Attributes:
        edits: Number of edits.
        concepts: Number of different sets of edited concepts among them.
        value: The correlation; nan if one of the two is the same for all edits.
        interval: Its bounds at 95 %, by resampled concepts (edits if all have the same).
        p: Share of permutations that are at least as far from zero.
    """

    edits: int
    concepts: int
    value: float
    interval: tuple[float, float]
    p: float


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,) of ``values`` (n,); equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two columns (n,); nan if one of them is constant."""
    one, other = (ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else math.nan


def correlate(
    measure: Sequence[float], success: Sequence[float], concepts: Sequence[Hashable], seed: int = 0
) -> Correlation:
    """Correlate ``measure`` with ``success``, edit by edit.

    Args:
        measure: One number for each edit.
        success: Success of the attack on it.
        concepts: The edited concepts of each edit; edits with the same ones are drawn together.
        seed: Seed of the resamples and permutations.
    """
    first, second = np.array(measure, dtype=float), np.array(success, dtype=float)
    value, generator = spearman(first, second), np.random.default_rng(seed)
    clusters = [np.flatnonzero([one == other for one in concepts]) for other in dict.fromkeys(concepts)]
    drawn = clusters if len(clusters) > 1 else [np.array([place]) for place in range(len(first))]
    found, farther = [], 0
    for _ in range(DRAWS):
        places = np.concatenate([drawn[i] for i in generator.integers(len(drawn), size=len(drawn))])
        found.append(spearman(first[places], second[places]))
        farther += abs(spearman(first, generator.permutation(second))) >= abs(value) - 1e-12
    known = [one for one in found if not math.isnan(one)]
    low, high = np.quantile(known, [0.025, 0.975]) if known and not math.isnan(value) else (math.nan, math.nan)
    p = math.nan if math.isnan(value) else (farther + 1) / (DRAWS + 1)
    return Correlation(len(first), len(clusters), value, (float(low), float(high)), p)


def measures(run: RunResult) -> dict[str, float]:
    """The limits that the edit of ``run`` reports, by name; those it does not report are left out."""
    scores = run.scores
    layers = [layer["reach"] for layer in scores.edit.get("layers", {}).values() if "reach" in layer]
    attacked = {result.concept for result in run.attacks}
    found = {"reach": scores.edit.get("reach"), "mean reach": fmean(layers) if layers else None}
    for name, measurement in (("spontaneous, before", scores.before), ("spontaneous, after", scores)):
        per_concept = measurement.per_concept if measurement else {}
        shares = [per_concept[name].share_spontaneous for name in attacked if name in per_concept]
        known = [share for share in shares if share is not None]
        found[name] = fmean(known) if known else None
    return {name: value for name, value in found.items() if value is not None}


def successes(run: RunResult) -> dict[str, float]:
    """Success of each attack on ``run``, averaged over concepts, and the mean of all attacks."""
    by_attack: dict[str, list[float]] = {}
    for result in run.attacks:
        by_attack.setdefault(result.attack, []).append(result.shown)
    found = {name: fmean(shown) for name, shown in by_attack.items()}
    return {**found, EVERY: fmean(found.values())} if len(found) > 1 else found


def correlations(runs: Sequence[RunResult]) -> dict[tuple[str, str], Correlation]:
    """The correlation of each measure with the success of each attack, where enough edits have both."""
    pairs: dict[tuple[str, str], list[tuple[float, float, tuple[str, ...]]]] = {}
    for run in runs:
        for attack, success in successes(run).items():
            for name, value in measures(run).items():
                pairs.setdefault((attack, name), []).append((value, success, tuple(sorted(run.scores.edited))))
    return {key: correlate(*zip(*found, strict=True)) for key, found in pairs.items() if len(found) >= FEWEST}


def markdown(runs: Sequence[RunResult]) -> str:
    """The tables: over all edits, then over those of each method that has enough."""
    methods: dict[str, list[RunResult]] = {}
    for run in runs:
        methods.setdefault(run.scores.method, []).append(run)
    lines = ["# Limits and attacks", ""]
    lines += [
        f"{len(runs)} attacked edits (methods: {', '.join(methods)}). Spearman's rank correlation of what an edit"
    ]
    lines += [
        "reports with the success of attacks on it; 95 % intervals by resampled concepts; p by permutation. A dash:"
    ]
    lines += ["one of the two is the same for all edits.", ""]
    parts: Mapping[str, Sequence[RunResult]] = {"All methods": runs, **(methods if len(methods) > 1 else {})}
    for title, own in parts.items():
        found = correlations(own)
        if not found:
            continue
        lines += [f"## {title}", "", "| attack | measure | edits | sets of concepts | correlation | p |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
        for (attack, name), one in found.items():
            value = (
                "-" if math.isnan(one.value) else f"{one.value:.2f} ({one.interval[0]:.2f} to {one.interval[1]:.2f})"
            )
            p = "-" if math.isnan(one.p) else f"{one.p:.3f}"
            lines.append(f"| {attack.replace('_', ' ')} | {name} | {one.edits} | {one.concepts} | {value} | {p} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders that contain runs")
    parser.add_argument("-o", "--output", default=None, help="Markdown file; without it the tables are printed")
    arguments = parser.parse_args()
    try:
        runs = [run for run in collect(arguments.folders) if run.attacks and measures(run)]
    except ValueError as error:
        parser.error(str(error))
    if len(runs) < FEWEST:
        parser.error(f"{len(runs)} of the runs have attacks and report a limit: a correlation needs at least {FEWEST}.")
    text = markdown(runs)
    if arguments.output is None:
        print(text)
        return
    with atomic_write(Path(arguments.output)) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
