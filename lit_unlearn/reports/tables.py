"""Tables of scores: for the terminal, and as Markdown in the paper's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from lit_unlearn.evaluation.metrics import both_harmonic_means
from lit_unlearn.evaluation.scores import OWN_INTERVALS, Measurement, Scores

FURTHER = {
    "adjacent": "retain, adjacent concepts",
    "adversarial": "forget, adversarial prompts",
    "crosswise": "forget, crosswise",
    "spontaneous": "spontaneous rate",
    "err": "harmonic mean of five (ERR)",
}
"""Scores at the end of a table, if a run has them."""

NO_SCORE = "-"
"""Shown where no picture was judged."""


def scores_table(before: Measurement | None, after: Measurement) -> Table:
    """Return the table that a run prints: per concept the share of pictures that show it, then the scores.

    Args:
        before: The unedited model on the same prompts and seeds, if it was judged.
        after: The edited model.

    Returns:
        The table, edited concepts first and in bold. If several are edited, the column ``crosswise`` has for each the
        share of pictures of the other edited concepts' prompts that show it, before and after.
    """
    crossed = after.crosswise is not None  # a column more: all of them are to fit into 80 characters
    table = Table(
        title=_title(after), title_justify="left", header_style="bold", box=HORIZONTALS, collapse_padding=crossed
    )
    table.add_column("pictures that show their concept", min_width=12 if crossed else 17)
    columns = [("before", before), ("after", after)] if before else [("share", after)]
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    if crossed:
        table.add_column("crosswise", justify="right", no_wrap=True)
    table.add_column("judged", justify="right", no_wrap=True)

    edited_first = sorted(after.per_concept.items(), key=lambda item: not item[1].edited)
    for place, (name, concept) in enumerate(edited_first):
        shares = []
        for _, measurement in columns:
            score = measurement.per_concept.get(name)
            shares.append(_number(score.share_with_concept if score else None, 2))
        if crossed:
            crosswise = [m.per_concept[name].share_crosswise for _, m in columns if name in m.per_concept]
            shares.append(" → ".join(_number(share, 2) for share in crosswise) if concept.edited else "")
        label = Text(f"{name} (edited)" if concept.edited else name, style="bold magenta" if concept.edited else "")
        last = place + 1 == len(edited_first) or edited_first[place + 1][1].edited != concept.edited
        judged = Text(f"{concept.n}/{concept.n + concept.missing}", style="bold red" if concept.missing else "dim")
        style = "bold" if concept.edited else None
        table.add_row(label, *(Text(share) for share in shares), judged, style=style, end_section=last)

    for name in ("forget", "retain", "harmonic_mean"):
        cells = [_with_interval(m, name, getattr(m, name)) for _, m in columns]
        table.add_row(name.replace("_", " "), *cells, style="bold", end_section=name == "harmonic_mean")
    for name in ("forget", "retain"):
        for part in ("direct", "indirect"):
            cells = [_with_interval(m, f"{name}_{part}", getattr(getattr(m, part), name)) for _, m in columns]
            table.add_row(f"{name}, {part} prompts", *cells)
    for name, title in FURTHER.items():
        if getattr(after, name) is not None:
            interval = OWN_INTERVALS.get(name, name)
            table.add_row(title, *(_with_interval(m, interval, getattr(m, name)) for _, m in columns))
    if isinstance(after, Scores) and (reach := after.edit.get("reach")) is not None:
        table.add_row("reach", *([""] * (len(columns) - 1)), _number(reach))
    if isinstance(after, Scores) and (relapse := after.relapse) is not None and relapse.share is not None:
        low, high = relapse.interval
        cell = f"{relapse.share:.3f} ({low:.2f}-{high:.2f})"
        table.add_row("relapse, earlier concepts", *([""] * (len(columns) - 1)), cell)
    missing = sum(concept.missing for concept in after.per_concept.values())
    if missing:
        failed = sum(concept.failed for concept in after.per_concept.values())
        table.caption = f"{missing} pictures have no verdict and are in no score; the judge failed on {failed} of them."
    return table


def summary_markdown(runs: Sequence[Scores]) -> str:
    """Return the paper's table of many runs: a row per edited concept, averages, and both harmonic means.

    Args:
        runs: Scores of one protocol; a table is made for each method. Runs of the same method and concept with
            different seeds have separate rows.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: There are no runs, or they cannot be compared (another concept set, judge, or number of pictures).
    """
    if not runs:
        raise ValueError("There are no scores to summarise.")
    for field in ("concepts", "judge", "images_per_concept"):
        values = {json.dumps(run.to_dict()[field]): run for run in runs}
        if len(values) > 1:
            (one, a), (other, b) = list(values.items())[:2]
            raise ValueError(
                f"Scores of different protocols do not compare: {field} is {one} for {_edited(a)} ({a.method}) "
                f"but {other} for {_edited(b)} ({b.method}); summarise them separately."
            )
    methods = list(dict.fromkeys(run.method for run in runs))
    tables = [_method_markdown([run for run in runs if run.method == method]) for method in methods]
    if len(methods) == 1:
        return tables[0]
    return "\n".join(f"### {method}\n\n{table}" for method, table in zip(methods, tables, strict=True))


def concepts_markdown(runs: Sequence[Scores]) -> str:
    """Return a table of forget / retain for each method and set of edited concepts, averaged over seeds."""
    methods = list(dict.fromkeys(run.method for run in runs))
    lines = [f"| concept | {' | '.join(methods)} |", "| --- |" + " ---: |" * len(methods)]
    for edited in dict.fromkeys(_edited(run) for run in runs):
        cells = []
        for method in methods:
            own = [run for run in runs if run.method == method and _edited(run) == edited]
            means = []
            for name in ("forget", "retain"):
                values = [value for run in own if (value := getattr(run, name)) is not None]
                means.append(_number(fmean(values) if values else None, 2))
            cells.append(" / ".join(means) if own else NO_SCORE)
        lines.append(f"| {' | '.join([edited.replace('|', chr(92) + '|'), *cells])} |")
    return "\n".join(lines) + "\n"


def _method_markdown(runs: Sequence[Scores]) -> str:
    names = [_edited(run) for run in runs]
    lines = ["| Concept | Forget | Retain | HM |", "| --- | ---: | ---: | ---: |"]
    for name, run in zip(names, runs, strict=True):
        label = f"{name} (seed {run.seed})" if names.count(name) > 1 else name
        lines.append(_row(label.replace("|", "\\|"), run.forget, run.retain, run.harmonic_mean))
    pairs = [(run.forget, run.retain) for run in runs if run.forget is not None and run.retain is not None]
    if pairs:
        forget, retain = [f for f, _ in pairs], [r for _, r in pairs]
        of_averages, average = both_harmonic_means(forget, retain)
        label = "Average" if len(pairs) == len(runs) else f"Average of {len(pairs)} of {len(runs)}"
        lines.append(_row(f"**{label}**", fmean(forget), fmean(retain), average))
        lines.append(_row("**Harmonic mean of the averages**", "", "", of_averages))
    return "\n".join(lines) + "\n"


def _row(label: str, *values: float | str | None) -> str:
    cells = [value if isinstance(value, str) else _number(value) for value in values]
    return f"| {' | '.join([label, *cells])} |"


def _edited(run: Scores) -> str:
    return ", ".join(run.edited) or "unedited"


def _number(value: float | None, digits: int = 3) -> str:
    return NO_SCORE if value is None else f"{value:.{digits}f}"


def _with_interval(measurement: Measurement, name: str, value: float | None) -> str:
    interval = measurement.intervals.get(name) if value is not None else None
    return _number(value) + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def _title(measurement: Measurement) -> Text:
    if not isinstance(measurement, Scores):
        return Text("Scores", style="bold")
    pictures = f"{measurement.images_per_concept} pictures per concept, judged by {measurement.judge}"
    return Text.assemble((f"{measurement.method}: {_edited(measurement)}", "bold"), f"\n{pictures}", overflow="fold")
