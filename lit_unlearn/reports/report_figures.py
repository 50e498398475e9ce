"""Figures of a report: forget against retain, robustness, a heat map of concepts and methods, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lit_unlearn.reports.attack_results import attack_words
from lit_unlearn.reports.summary import MethodSummary

MARKERS = "os^Dv<>pPX*hd8"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the ``points`` (forget, retain) on the Pareto front: no other point is as good or better in both.

    Returns:
        Indices in the order of ascending forget score; of equal points only the first.
    """
    return sorted(
        (
            i
            for i, (x, y) in enumerate(points)
            if not any((a >= x and b >= y and (a, b) != (x, y)) or (j < i and (a, b) == (x, y))
                       for j, (a, b) in enumerate(points))
        ),
        key=lambda i: points[i],
    )  # fmt: skip


def tradeoff_figure(summaries: Sequence[MethodSummary]) -> Figure:
    """Forget against retain score, one point per method with its intervals; a line connects the Pareto front."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points = [(summary.scores["forget"], summary.scores["retain"]) for summary in summaries]
    for number, (summary, (forget, retain)) in enumerate(zip(summaries, points, strict=True)):
        (left, right), (low, high) = (
            summary.intervals.get(name, (summary.scores[name],) * 2) for name in ("forget", "retain")
        )
        axes.errorbar(
            forget,
            retain,
            xerr=[[max(0.0, forget - left)], [max(0.0, right - forget)]],
            yerr=[[max(0.0, retain - low)], [max(0.0, high - retain)]],
            fmt=MARKERS[number % len(MARKERS)],
            color=f"C{number % 10}",
            markersize=7,
            capsize=2,
            linewidth=0.8,
            label=summary.method,
        )
    front = [points[i] for i in pareto_front(points)]
    axes.plot([x for x, _ in front], [y for _, y in front], color="0.6", linewidth=1, zorder=0, label="Pareto front")
    axes.set_xlabel("forget: pictures of the edited concepts without them")
    axes.set_ylabel("retain: pictures of the others with theirs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def robustness_figure(summaries: Sequence[MethodSummary], attacks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars per method: how much stays forgotten on direct, indirect and adversarial prompts and under each attack.

    Args:
        summaries: One summary per method.
        attacks: For each method and attack, the share of pictures that show the concept under the attack.
    """
    kinds = [("direct", "forget_direct"), ("indirect", "forget_indirect"), ("adversarial", "adversarial")]
    rows: dict[str, list[float]] = {
        label: [summary.scores.get(name, math.nan) for summary in summaries] for label, name in kinds
    }
    names = list(dict.fromkeys(name for of_method in attacks.values() for name in of_method))
    for name in names:
        rows[attack_words(name)] = [1 - attacks.get(s.method, {}).get(name, math.nan) for s in summaries]
    figure = Figure(figsize=(max(7, 0.9 * len(summaries) + 3), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, (label, values) in enumerate(rows.items()):
        axes.bar(
            np.arange(len(summaries)) + number * width,
            values,
            width,
            label=label.replace("$", r"\$"),  # a negative prompt is not a formula
            color=f"C{number % 10}",
            hatch="//" if number >= 10 else None,  # there are ten colours
        )
    axes.set_xticks(np.arange(len(summaries)) + 0.4 - width / 2, [s.method for s in summaries], rotation=30, ha="right")
    axes.set_ylabel("pictures without the concept")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def heat_map_figure(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Harmonic mean of forget and retain by method (rows) and edited concept (columns); empty cells have no run."""
    concepts = list(dict.fromkeys(name for of_method in scores.values() for name in of_method))
    values = np.array([[of_method.get(name, math.nan) for name in concepts] for of_method in scores.values()])
    figure = Figure(figsize=(0.55 * len(concepts) + 3, 0.4 * len(scores) + 1.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(concepts)), concepts, rotation=60, ha="right")
    axes.set_yticks(range(len(scores)), list(scores))
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axes, label="harmonic mean")
    return figure


def cost_figure(summaries: Sequence[MethodSummary]) -> Figure:
    """Harmonic mean against the cost of the edit in UNet forward passes (a backward pass counts as two)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, summary in enumerate(summaries):
        costs = summary.costs
        equivalents = costs.get("unet_forwards", 0) + 2 * costs.get("unet_backwards", 0)
        axes.scatter(
            max(equivalents, 1),  # log(0) is not defined
            summary.hm_of_averages,
            marker=MARKERS[number % len(MARKERS)],
            color=f"C{number % 10}",
            s=45,
            label=f"{summary.method} ({costs.get('seconds', math.nan):.0f} s)",
        )
    axes.set_xscale("log")
    axes.set_xlim(0.7, max(10.0, 2 * axes.get_xlim()[1]))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("UNet forward-equivalents of the edit (none stands at 1)")
    axes.set_ylabel("harmonic mean of the averages")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
