"""Figures of a report: forget against retain, robustness, a heat map of concepts and methods, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation, Transform

from lit_unlearn.reports.attack_results import attack_words
from lit_unlearn.reports.summary import MethodSummary

MARKERS = "os^Dv<>pPX*hd8"
SIDE = 9
"""Distance of markers that would hide each other, in points."""
NEAR = 0.02
"""Markers hide each other if they are nearer than this share of the figure's range, across and up."""
SIDE_BY_SIDE = "equal ones stand side by side"
AXIS = 320
"""About the length of a figure's axis, in points."""


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


def side_by_side(points: Sequence[tuple[float, float]], ranges: tuple[float, float]) -> list[float]:
    """How far each of the ``points`` is moved sideways, in points of the page, so that no marker hides another.

    Args:
        points: Across and up, in the axes' units.
        ranges: Lengths of the axes, in the same units.
    """
    near = [NEAR * length for length in ranges]
    heaps: list[list[int]] = []
    for place, point in enumerate(points):
        for heap in heaps:
            if all(abs(a - b) <= limit for a, b, limit in zip(point, points[heap[0]], near, strict=True)):
                heap.append(place)
                break
        else:
            heaps.append([place])
    moved = [0.0] * len(points)
    for heap in heaps:
        for number, place in enumerate(heap):
            moved[place] = SIDE * (number - (len(heap) - 1) / 2)
    return moved


def _limits(ends: Sequence[float], points: Sequence[tuple[float, float]], axis: int) -> tuple[float, float]:
    """Ends of an axis that shows the intervals' ``ends`` and the ``points``, with a margin, and at least a tenth."""
    shown = [*ends, *(point[axis] for point in points)] or [0.0, 1.0]
    middle, half = (max(shown) + min(shown)) / 2, max(0.05, (max(shown) - min(shown)) / 2)
    return middle - 1.1 * half, middle + 1.1 * half


def _moved(axes: Axes, figure: Figure, points: float) -> Transform:
    """The data's coordinates, moved sideways by so many points of the page."""
    return axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def tradeoff_figure(summaries: Sequence[MethodSummary]) -> Figure:
    """Forget against retain score, one point per method with its intervals; a line connects the Pareto front."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points = [(summary.scores["forget"], summary.scores["retain"]) for summary in summaries]
    bounds = [
        [summary.intervals.get(name, (summary.scores[name],) * 2) for name in ("forget", "retain")]
        for summary in summaries
    ]
    limits = [_limits([end for of_method in bounds for end in of_method[i]], points, i) for i in (0, 1)]
    moved = side_by_side(points, (limits[0][1] - limits[0][0], limits[1][1] - limits[1][0]))
    for number, ((forget, retain), ((left, right), (low, high))) in enumerate(zip(points, bounds, strict=True)):
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
            label=summaries[number].method,
            transform=_moved(axes, figure, moved[number]),
        )
    front = [points[i] for i in pareto_front(points)]
    axes.plot([x for x, _ in front], [y for _, y in front], color="0.6", linewidth=1, zorder=0, label="Pareto front")
    axes.set_xlabel("forget: pictures of the edited concepts without them")
    axes.set_ylabel("retain: pictures of the others with theirs")
    axes.grid(alpha=0.3)
    room = (limits[0][1] - limits[0][0]) * max(moved, default=0) / AXIS
    axes.set_xlim(limits[0][0] - room, limits[0][1] + room)
    axes.set_ylim(*limits[1])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), **_legend(moved))
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
    figure = Figure(figsize=(max(7, 0.9 * len(summaries) + 3), 5), layout="constrained")
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
        for place, value in enumerate(values):
            if value == 0:
                _say(axes, place + number * width, "0", "0.2")
            elif math.isnan(value) and number < len(kinds):
                _say(axes, place + number * width, "not judged", "0.45")
            elif math.isnan(value) and summaries[place].method in attacks:
                _say(axes, place + number * width, "not attacked", "0.45")
    for place, summary in enumerate(summaries):
        if names and summary.method not in attacks:
            middle = len(kinds) + (len(names) - 1) / 2
            _say(axes, place + middle * width, "not attacked", "0.45")
    axes.set_xticks(np.arange(len(summaries)) + 0.4 - width / 2, [s.method for s in summaries], rotation=30, ha="right")
    axes.set_ylabel("pictures without the concept")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _say(axes: Axes, x: float, words: str, color: str) -> None:
    """Write upwards from the axis, where no bar is seen."""
    axes.text(x, 0.01, words, rotation=0 if words == "0" else 90, ha="center", va="bottom", fontsize=7, color=color)


def _legend(moved: Sequence[float]) -> dict[str, Any]:
    """What a legend says if markers were moved."""
    return {"fontsize": "small", "title": SIDE_BY_SIDE if any(moved) else None, "title_fontsize": "small"}


def heat_map_figure(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Harmonic mean of forget and retain by method (rows) and edited concept (columns); empty cells have no run."""
    concepts = list(dict.fromkeys(name for of_method in scores.values() for name in of_method))
    values = np.array([[of_method.get(name, math.nan) for name in concepts] for of_method in scores.values()])
    figure = Figure(
        figsize=(max(7.0, 0.55 * len(concepts) + 3), max(2.5, 0.4 * len(scores) + 1.8)), layout="constrained"
    )
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
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    paid = [
        max(
            summary.costs.get("unet_forwards", 0) + 2 * summary.costs.get("unet_backwards", 0), 1
        )  # log(0) is not defined
        for summary in summaries
    ]
    low, high = math.log10(0.7), math.log10(max(10, 2 * max(paid, default=1)))
    places = [(math.log10(cost), s.hm_of_averages) for cost, s in zip(paid, summaries, strict=True)]
    moved = side_by_side(places, (high - low, 1.03))
    for number, summary in enumerate(summaries):
        costs = summary.costs
        axes.scatter(
            paid[number],
            summary.hm_of_averages,
            marker=MARKERS[number % len(MARKERS)],
            color=f"C{number % 10}",
            s=45,
            label=f"{summary.method} ({_seconds(costs.get('seconds'))})",
            transform=_moved(axes, figure, moved[number]),
        )
    axes.set_xscale("log")
    room = (high - low) * max(moved, default=0) / AXIS
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("UNet forward-equivalents of the edit (none stands at 1)")
    axes.set_ylabel("harmonic mean of the averages")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), **_legend(moved))
    return figure


def _seconds(value: float | None) -> str:
    return "time not known" if value is None else f"{value:.0f} s"
