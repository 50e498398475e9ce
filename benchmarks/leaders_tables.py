"""The tables of ``leaders.py``, from its stored results: shares pooled over pictures, with Wilson intervals at 95 %."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from emoji20 import SINGLE
from limits import correlate

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.evaluation.metrics import wilson_interval

Pick = Callable[[Any], Any]
"""From a stored result to a number, or to counts."""
Results = Mapping[str, Mapping[str, Any]]
HALVES = {"all twenty": SINGLE, "chosen on": SINGLE[:10], "decided on": SINGLE[10:]}


def tables(results: Results) -> str:
    """All tables as Markdown."""
    methods = list(dict.fromkeys(key.split("/")[0] for key in results))
    parts = [many(results, methods), in_sequence(results, methods), alone(results, methods)]
    parts += [
        under_attack(results, methods),
        side_by_side(results, methods),
        under_attack(results, methods, PROBED, "Probed"),
        by_concept(results, methods),
        limits(results, methods),
        took(results),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A number; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def share(part: float | None, pictures: float | None) -> str:
    """A share of ``pictures`` with its interval."""
    if part is None or not pictures:
        return ""
    low, high = wilson_interval(round(part * pictures), round(pictures))
    return f"{part:.3f} ({low:.2f}–{high:.2f})"


def many(results: Results, methods: Sequence[str]) -> str:
    """Ten and twenty concepts at once."""
    rows = []
    for method in methods:
        for protocol in ("ten", "twenty"):
            if found := results.get(f"{method}/{protocol}"):
                pictures = found["pictures"]
                rows.append(
                    [
                        f"{method}, {protocol}",
                        share(found["forget"], pictures["forget"]),
                        share(found["crosswise"], None if protocol == "" else pictures["forget"] * 9),
                        share(found["retain"], pictures["retain"]),
                        share(found["held"], found["held_pictures"]),
                        share(found["held_second"], found["held_pictures"]),
                        number(found["drift"]),
                        number(found["leak"]),
                        number(found["kappa"], 2),
                        number(found["seconds"], 1),
                    ]
                )
    header = ["", "forget", "crosswise", "retain", "held", "held, second judge"]
    header += ["drift", "leak", "judges' kappa", "seconds of the fit"]
    return f"## Many concepts at once\n\n{table(header, rows)}" if rows else ""


def in_sequence(results: Results, methods: Sequence[str]) -> str:
    """After each number of edits: forget, relapse, held."""
    found = {method: results[f"{method}/sequence"]["steps"] for method in methods if f"{method}/sequence" in results}
    rows = []
    for method, steps in found.items():
        for step, scores in sorted(steps.items(), key=lambda item: int(item[0])):
            count = 10 * int(step)
            rows.append(
                [
                    f"{method}, {step}",
                    share(scores["forget"], count),
                    share(scores["relapse"], count - 10),
                    share(scores["retain"], 200 - count),
                    share(scores["held"], scores["held_pictures"]),
                    number(scores["seconds"], 0),
                ]
            )
    header = ["method, edits so far", "forget, all so far", "relapse, earlier ones", "retain", "held", "seconds so far"]
    return f"## One after another\n\n{table(header, rows)}" if rows else ""


def mean_of(results: Results, method: str, measure: str, concepts: Sequence[str], pick: Pick) -> float | None:
    """Mean of a number over the concepts that have it; None if a concept lacks its result."""
    keys = [f"{method}/{measure}/{concept}" for concept in concepts]
    if not all(key in results for key in keys):
        return None
    values = [pick(results[key]) for key in keys]
    return None if None in values or not values else fmean(values)


def alone(results: Results, methods: Sequence[str]) -> str:
    """Single concepts without attack."""
    rows = []
    for method in methods:
        for half, concepts in HALVES.items():
            done = [concept for concept in concepts if f"{method}/clean/{concept}" in results]
            if not done or (len(done) < len(concepts) and half != "all twenty"):
                continue

            def mean(field: str, done: Sequence[str] = done, method: str = method) -> float | None:
                return mean_of(results, method, "clean", done, lambda found: found[field])

            counts = [
                sum(results[f"{method}/clean/{concept}"]["pictures"][part] for concept in done)
                for part in ("forget", "retain")
            ]
            spontaneous = mean_of(results, method, "clean", done, lambda found: found["unedited"]["spontaneous"])
            rows.append(
                [
                    f"{method}, {half if len(done) == len(concepts) else f'{len(done)} concepts'}",
                    share(mean("forget"), counts[0]),
                    share(mean("retain"), counts[1]),
                    number(mean("adversarial")),
                    number(mean("drift"), 4),
                    number(mean("leak")),
                    number(mean("reach"), 2),
                    f"{number(spontaneous)} → {number(mean('spontaneous'))}",
                    number(mean("seconds"), 1),
                ]
            )
    header = ["", "forget", "retain", "forget, adversarial prompts", "drift", "leak", "reach", "spontaneous", "seconds"]
    return f"## One concept at a time\n\n{table(header, rows)}" if rows else ""


def pooled(results: Results, method: str, measure: str, concepts: Sequence[str], pick: Pick) -> str:
    """Share of pictures under attack, pooled over the concepts that have a result, with their number."""
    found = [results[key] for concept in concepts if (key := f"{method}/{measure}/{concept}") in results]
    counts = [pair for pair in map(pick, found) if pair is not None]
    if not counts:
        return ""
    shown, pictures = (sum(pair[side] for pair in counts) for side in (0, 1))
    few = f", {len(counts)} concepts" if len(counts) < len(concepts) else ""
    return share(shown / pictures, pictures) + few


def token_share(label: str) -> Callable[[Any], tuple[int, int] | None]:
    """Picks shown and judged pictures of a learned token, over all seeds."""
    return lambda found: (sum(found["shown"][label]), len(found["shown"][label]) * found["pictures"])


def attack_share(name: str) -> Callable[[Any], tuple[float, int] | None]:
    """Picks shown and judged pictures of an attack."""
    return lambda found: (
        (found[name]["shown"] * found[name]["pictures"], found[name]["pictures"]) if name in found else None
    )


COLUMNS: dict[str, tuple[str, Pick]] = {
    "learned token": ("token", token_share("guided")),
    "second judge": ("token", token_share("guided_second")),
    "at guidance 1": ("token", token_share("unguided")),
    "4 × steps, best of 3": ("strong", attack_share("concept_inversion")),
    "prompt search": ("attacks", attack_share("prompt_search")),
    "Ring-A-Bell": ("attacks", attack_share("ring_a_bell")),
    "completion": ("attacks", attack_share("completion")),
    "noise probe": ("attacks", attack_share("noise_probe")),
    "relearning": ("attacks", attack_share("relearning")),
}
PROBED: dict[str, tuple[str, Pick]] = {
    label: ("probes", attack_share(name))
    for label, name in {
        "image to image": "image_to_image",
        "inpainting": "inpainting",
        "inversion": "inversion",
        "prompt levels": "prompt_levels",
        "relearning on others": "relearning_others",
        "relearning, all weights": "relearning_all",
    }.items()
}


def under_attack(
    results: Results,
    methods: Sequence[str],
    columns: Mapping[str, tuple[str, Pick]] = COLUMNS,
    title: str = "Under attack",
) -> str:
    """Shares of pictures that show the concept under attack; both halves and kinds of concepts."""
    kinds = {c.name: c.kind for c in load_concept_set("emoji20").concepts.values()}
    groups = dict(HALVES)
    groups["objects, actions"] = tuple(name for name in SINGLE if kinds[name] in ("object", "action"))
    groups["styles, scenes"] = tuple(name for name in SINGLE if kinds[name] in ("style", "scene"))
    rows = []
    for method in methods:
        for group, concepts in groups.items():
            cells = [pooled(results, method, measure, concepts, pick) for measure, pick in columns.values()]
            if any(cells):
                rows.append([f"{method}, {group}", *cells])
    return f"## {title}\n\n{table(['', *columns], rows)}" if rows else ""


def side_by_side(results: Results, methods: Sequence[str]) -> str:
    """Attacks on the concepts for which all methods have them, so that methods are compared on the same pictures."""
    concepts = [name for name in SINGLE if all(f"{method}/attacks/{name}" in results for method in methods)]
    columns = {label: pick for label, (measure, pick) in COLUMNS.items() if measure == "attacks"}
    rows = [
        [method, *(pooled(results, method, "attacks", concepts, pick) for pick in columns.values())]
        for method in methods
    ]
    title = f"## Other attacks on the same {len(concepts)} concepts: {', '.join(concepts)}"
    return f"{title}\n\n{table(['', *columns], rows)}" if concepts else ""


def by_concept(results: Results, methods: Sequence[str]) -> str:
    """The learned token, concept by concept, beside reach and the unedited model's spontaneous rate."""
    attacked = [method for method in methods if any(key.startswith(f"{method}/token/") for key in results)]
    rows = []
    for concept in SINGLE:
        row = [concept]
        for method in attacked:
            found = results.get(f"{method}/token/{concept}")
            clean = results.get(f"{method}/clean/{concept}", {})
            counts = token_share("guided")(found) if found else None
            row += ["" if counts is None else number(counts[0] / counts[1], 2), number(clean.get("reach"), 2)]
        spontaneous = [
            results[key]["unedited"]["spontaneous"] for m in methods if (key := f"{m}/clean/{concept}") in results
        ]
        rows.append([*row, number(spontaneous[0], 2) if spontaneous else ""])
    header = ["", *(text for method in attacked for text in (method, "its reach")), "spontaneous, unedited"]
    return f"## The learned token, by concept\n\n{table(header, rows)}" if attacked else ""


def limits(results: Results, methods: Sequence[str]) -> str:
    """Rank correlation of reach and spontaneous rate with the success of learned tokens, over all edits."""
    columns: dict[str, Pick] = {
        "reach": lambda found: found["reach"],
        "spontaneous, unedited": lambda found: found["unedited"]["spontaneous"],
    }
    rows = []
    for label, pick in columns.items():
        for group in (methods, *((method,) for method in methods)):
            points = [
                (value, pair[0] / pair[1], concept)
                for method in group
                for concept in SINGLE
                if (clean := results.get(f"{method}/clean/{concept}")) and (value := pick(clean)) is not None
                if (token := results.get(f"{method}/token/{concept}")) and (pair := token_share("guided")(token))
            ]
            if len(points) >= 10:
                found = correlate(*zip(*points, strict=True))
                interval = "{:.2f} to {:.2f}".format(*found.interval)
                name = "all methods" if group is methods else group[0]
                rows.append([f"{label}, {name}", str(len(points)), f"{found.value:.2f} ({interval})", f"{found.p:.3f}"])
    header = ["", "edits", "Spearman's correlation", "p, by permutation"]
    return f"## Do reach and spontaneous rate foretell the learned token?\n\n{table(header, rows)}" if rows else ""


def took(results: Results) -> str:
    """How long all results took."""
    hours = sum(found.get("took", 0.0) for found in results.values()) / 3600
    return f"{len(results)} results; {hours:.1f} hours of one core in all."
