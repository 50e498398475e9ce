"""The table of attacks in a report: results of many runs, sorted by method and by attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from lit_unlearn.reports.attack_results import AttackResult, attack_words
from lit_unlearn.reports.summary import bootstrap_interval


def by_label(results: Iterable[AttackResult]) -> dict[str, list[AttackResult]]:
    """Results by attack, those with another guidance or negative prompt apart from the others, in their order."""
    found: dict[str, list[AttackResult]] = {}
    for result in results:
        found.setdefault(result.label, []).append(result)
    return found


def attacks_markdown(methods: Mapping[str, Sequence[AttackResult]]) -> str:
    """Share of pictures that show the concept under each attack, before it and on the unedited model; with costs.

    Args:
        methods: Results by method. If some have controls, a column has the largest share of the controls of each.
    """
    heads = ["method", "attack", "runs", "before the attack", "under attack", "unedited", "seconds", "UNet forwards"]
    controlled = any(result.controls for results in methods.values() for result in results)
    if controlled:
        heads.insert(5, "control")
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for method, of_method in methods.items():
        for label, results in by_label(of_method).items():
            cells = [f"{fmean(getattr(r, key) for r in results):.3f}" for key in ("pre_attack", "shown", "unedited")]
            low, high = _shown_interval(results)
            cells[1] += f" ({low:.2f}–{high:.2f})"
            if controlled:
                shares = [result.control for result in results if result.control is not None]
                cells.insert(2, f"{fmean(shares):.3f}" if shares else "-")
            cells += [f"{fmean(getattr(r, key) for r in results):.0f}" for key in ("seconds", "unet_forwards")]
            words = attack_words(label).replace("|", "&#124;")  # a bar would end the cell
            lines.append(f"| {method} | {words} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown_interval(results: Sequence[AttackResult]) -> tuple[float, float]:
    """95 % interval of the average share under attack: by resampling concepts, or the interval of a single result."""
    if len(results) == 1:
        return results[0].intervals["shown"]
    shown = np.array([[result.shown] for result in results])
    return bootstrap_interval(lambda rows: float(rows.mean()), shown, [result.concept for result in results])
