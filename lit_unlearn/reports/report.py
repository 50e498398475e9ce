"""Makes one report of many runs: Markdown and CSV; ``page`` makes the HTML page.

Data flow: folders are searched for ``scores.json`` (and ``attacks.json`` beside it); runs are sorted by protocol, then
into groups by how many concepts they edit at once; each group becomes verdicts (``verdicts``), tables (``summary``),
figures (``report_figures``) and pictures.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_unlearn import __version__
from lit_unlearn.evaluation.metrics import both_harmonic_means
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.reports.attack_results import FILE as ATTACKS_FILE
from lit_unlearn.reports.attack_results import AttackReport, AttackResult
from lit_unlearn.reports.attack_tables import attacks_markdown, by_label
from lit_unlearn.reports.notes import notes
from lit_unlearn.reports.paper import load_challenge_baselines, load_paper_tables
from lit_unlearn.reports.summary import (
    MethodSummary,
    seeds_markdown,
    summaries_markdown,
    summarise,
)
from lit_unlearn.reports.tables import concepts_markdown
from lit_unlearn.reports.verdicts import LIMITS, method_verdict, of
from lit_unlearn.system.run_file import scores_files

SEEDS = (
    "Mean ± standard deviation between runs that differ in the seed of the fit alone, and between tests of the same "
    "edit with other pictures."
)
PROTOCOL = ("concepts", "judge", "images_per_concept")
"""Fields of the scores that must be equal in all runs."""


@dataclass(frozen=True)
class RunResult:
    """A tested run: its folder, its scores, and the results of attacks, if there are any."""

    folder: Path
    scores: Scores
    attacks: list[AttackResult] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Runs that edit the same number of concepts at once."""

    number: int
    runs: list[RunResult]

    @property
    def title(self) -> str:
        """Heading of the group in a report."""
        return "One concept at a time" if self.number == 1 else f"{self.number} concepts at once"

    @property
    def methods(self) -> dict[str, list[RunResult]]:
        """Runs by method, in the order in which methods were found."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.scores.method, []).append(run)
        return found

    @property
    def verdicts(self) -> list[str]:
        """What the scores and the attacks say of each method, a sentence or two for each."""
        return [
            method_verdict(method, [run.scores for run in runs], self.attack_results[method])
            for method, runs in self.methods.items()
        ]

    @property
    def summaries(self) -> list[MethodSummary]:
        """One per method."""
        return [summarise([run.scores for run in runs]) for runs in self.methods.values()]

    @property
    def unedited(self) -> MethodSummary | None:
        """The unedited model on the same pictures; None if it was not judged."""
        runs = {(tuple(run.scores.edited), run.scores.seed): run.scores for run in self.runs if run.scores.before}
        return summarise(list(runs.values()), before=True) if runs else None

    @property
    def attack_results(self) -> dict[str, list[AttackResult]]:
        """The results of attacks by method."""
        return {method: [result for run in runs for result in run.attacks] for method, runs in self.methods.items()}

    @property
    def attacks(self) -> dict[str, dict[str, float]]:
        """For each method and attack, the average share of pictures that show the concept under the attack."""
        found: dict[str, dict[str, float]] = {}
        for method, of_method in self.attack_results.items():
            for name, results in by_label(of_method).items():
                found.setdefault(method, {})[name] = fmean(result.shown for result in results)
        return found


def find_runs(folders: Sequence[str | Path]) -> list[RunResult]:
    """Read all tested runs below ``folders``.

    Raises:
        ValueError: A folder does not exist or contains no tested run, or a file cannot be read.
    """
    runs = [RunResult(path.parent, Scores.load(path), _read_attacks(path.parent)) for path in scores_files(folders)]
    return list({run.folder.resolve(): run for run in runs}.values())


def by_protocol(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by what makes them comparable, in the order in which it is found: concept set, judge, number of pictures.

    The keys are headings, such as ``Concept set emoji20, judge emoji-cnn, 20 pictures per concept``.
    """
    found: dict[tuple[Any, ...], list[RunResult]] = {}
    for run in runs:
        found.setdefault(_protocol(run.scores), []).append(run)
    plain = [_protocol_title(of_protocol[0].scores) for of_protocol in found.values()]
    titles = [  # sets of one name and other content are told apart by their hash
        title.replace(",", f" ({str(key[0])[:8]}),", 1) if plain.count(title) > 1 else title
        for title, key in zip(plain, found, strict=True)
    ]
    return dict(zip(titles, found.values(), strict=True))


def collect(folders: Sequence[str | Path]) -> list[RunResult]:
    """Read all tested runs below ``folders``, which must be of one protocol.

    Raises:
        ValueError: As ``find_runs``, or runs differ in concept set, judge or number of pictures.
    """
    runs = find_runs(folders)
    first = runs[0]
    for run in runs[1:]:
        for name in PROTOCOL:
            one, other = getattr(first.scores, name), getattr(run.scores, name)
            one, other = (value.sha256 if name == "concepts" else value for value in (one, other))
            if one != other:
                shown = [getattr(r.scores, name) for r in (first, run)]
                shown = [value.name if name == "concepts" else value for value in shown]
                raise ValueError(
                    f"report: runs of different protocols do not compare: {name} is {shown[0]!r} in {first.folder} and "
                    f"{shown[1]!r} in {run.folder}{' with other content' if shown[0] == shown[1] else ''}; "
                    "report on them separately."
                )
    return runs


def _protocol(scores: Scores) -> tuple[Any, ...]:
    return scores.concepts.sha256 or scores.concepts.name, scores.judge, scores.images_per_concept


def _protocol_title(scores: Scores) -> str:
    pictures = of(scores.images_per_concept, "picture")
    return f"Concept set {scores.concepts.name}, judge {scores.judge}, {pictures} per concept"


def group(runs: Sequence[RunResult]) -> list[Group]:
    """Sort runs by how many concepts they edit at once."""
    numbers = sorted({len(run.scores.edited) for run in runs})
    return [Group(number, [run for run in runs if len(run.scores.edited) == number]) for number in numbers]


def report_markdown(runs: Sequence[RunResult]) -> str:
    """The report's tables as Markdown; runs of each protocol have a section of their own."""
    protocols = by_protocol(runs)
    lines = ["# Report", "", made_by(), ""]
    if len(protocols) > 1:
        lines += [separately(len(protocols)), ""]
    for title, of_protocol in protocols.items():
        level = "##" if len(protocols) == 1 else "###"
        lines += [f"## {title}", ""] if len(protocols) > 1 else []
        lines += [protocol_line(of_protocol), ""]
        lines += [line for note in notes([(run.folder, run.scores) for run in of_protocol]) for line in (note, "")]
        for part in group(of_protocol):
            lines += _part_markdown(part, level)
        if of_protocol[0].scores.concepts.name == "paper20":
            lines += [f"{level} The paper's figures", "", paper_markdown()]
    return "\n".join(lines) + "\n"


def _part_markdown(part: Group, level: str) -> list[str]:
    unedited = part.unedited
    rows = ([unedited] if unedited else []) + part.summaries
    lines = [f"{level} {part.title}", "", *(f"- {line}" for line in part.verdicts), "", LIMITS, ""]
    lines += [summaries_markdown(rows)]
    if seeds := seeds_markdown([run.scores for run in part.runs]):
        lines += [f"{level}# Seeds", "", SEEDS, "", seeds]
    if part.attacks:
        lines += [f"{level}# Under attack", "", attacks_markdown(part.attack_results)]
    if part.number == 1:
        lines += [f"{level}# Each concept: forget / retain", "", concepts_markdown([run.scores for run in part.runs])]
    return lines


def made_by() -> str:
    """When and by which version a report is made."""
    return f"Made on {datetime.now(timezone.utc):%Y-%m-%d at %H:%M} UTC by lit-unlearn {__version__}."


def separately(number: int) -> str:
    """What a report of runs of several protocols says."""
    return (
        f"The runs are of {number} protocols, whose numbers do not compare: each concept set, judge and number of "
        "pictures has a section of its own."
    )


def paper_markdown() -> str:
    """The paper's Tables 1 to 5 and the challenge's baselines (ERR), per concept."""
    tables, baselines = load_paper_tables(), load_challenge_baselines()
    labels = {"unedited": "unedited", "uce": "UCE", "esd": "ESD", "null_space": "the paper's method"}
    lines = [
        "Forget / retain as the paper prints them (SD 1.4, LLaVA-1.5-7B); ERR of the challenge's baselines.",
        "",
        f"| concept | {' | '.join(labels.values())} | ERR: ESD | ERR: CA | ERR: FMN |",
        "| --- |" + " ---: |" * 7,
    ]
    for concept in tables["unedited"]:
        cells = [f"{tables[key][concept]['forget']:.3f} / {tables[key][concept]['retain']:.3f}" for key in labels]
        cells += [f"{value:.3f}" if value is not None else "-" for value in baselines.get(concept, [None] * 3)]
        lines.append(f"| {concept} | {' | '.join(cells)} |")
    printed = [f"{tables['harmonic_mean'][key]:.3f}" for key in labels]
    lines.append(f"| harmonic mean of the averages | {' | '.join(printed)} | - | - | - |")
    average = []
    for key in labels:
        pairs = [scores for concept, scores in tables[key].items() if concept != "Average"]
        average.append(both_harmonic_means([s["forget"] for s in pairs], [s["retain"] for s in pairs])[1])
    lines.append(f"| average of the harmonic means | {' | '.join(f'{v:.3f}' for v in average)} | - | - | - |")
    return "\n".join(lines) + "\n"


def report_csv(runs: Sequence[RunResult]) -> str:
    """A table with a row per run, all its numbers, and a column per attack."""
    attacks = list(by_label(result for run in runs for result in run.attacks))
    rows = []
    several = any(run.scores.crosswise is not None for run in runs)
    for run in runs:
        s = run.scores
        row: dict[str, Any] = {
            "method": s.method,
            "edited": "+".join(s.edited),
            "concept_set": s.concepts.name,
            "training_seed": s.training_seed,
            "seed": s.seed,
            "judge": s.judge,
            "images_per_concept": s.images_per_concept,
            "forget": s.forget,
            "forget_low": s.intervals.get("forget", (None,))[0],
            "forget_high": s.intervals.get("forget", (None,))[-1],
            "forget_direct": s.direct.forget,
            "forget_indirect": s.indirect.forget,
            "forget_adversarial": s.adversarial,
            **({"forget_crosswise": s.crosswise} if several else {}),
            "retain": s.retain,
            "retain_low": s.intervals.get("retain", (None,))[0],
            "retain_high": s.intervals.get("retain", (None,))[-1],
            "adjacent": s.adjacent,
            "spontaneous": s.spontaneous,
            "spontaneous_unedited": s.before.spontaneous if s.before else None,
            "harmonic_mean": s.harmonic_mean,
            "err": s.err,
            "forget_unedited": s.before.forget if s.before else None,
            "retain_unedited": s.before.retain if s.before else None,
            "drift": s.drift["rmse"] if s.drift else None,
            "reach": s.edit.get("reach"),
            "weight_change_ratio": s.edit.get("weight_change_ratio"),
            "weight_change_norm": s.edit.get("weight_change_norm"),
            "seconds": s.cost.seconds if s.cost else None,
            "unet_forwards": s.cost.unet_forwards if s.cost else None,
            "unet_backwards": s.cost.unet_backwards if s.cost else None,
            "peak_memory_bytes": s.cost.peak_memory_bytes if s.cost else None,
            **{f"attack_{name}": None for name in attacks},
            "folder": run.folder.as_posix(),
        }
        for name, results in by_label(run.attacks).items():
            row[f"attack_{name}"] = fmean(result.shown for result in results)
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_attacks(folder: Path) -> list[AttackResult]:
    path = folder / ATTACKS_FILE
    return AttackReport.load(path).attacks if path.is_file() else []


def protocol_line(runs: Sequence[RunResult]) -> str:
    """What runs of one protocol have in common."""
    first = runs[0].scores
    models = ", ".join(dict.fromkeys(run.scores.backbone.name for run in runs))
    seeds = sorted({run.scores.seed for run in runs})
    return (
        f"{of(len(runs), 'run')} on {models}; concept set {first.concepts.name}, "
        f"{of(first.images_per_concept, 'picture')} per concept, judge {first.judge}, "
        f"evaluation {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}. "
        f"{_judge_line(runs)}Intervals: 95 %, sets of concepts resampled, then their runs (bootstrap)."
    )


def _judge_line(runs: Sequence[RunResult]) -> str:
    """How well the judge recognises the edited concepts in the unedited model's pictures; empty if not measured."""
    found = {
        (concept, numbers["average_precision"])
        for run in runs
        for concept, numbers in (run.scores.calibration or {}).items()
        if numbers["average_precision"] is not None
    }
    if not found:
        return ""
    low, high = (limit(value for _, value in found) for limit in (min, max))
    concepts = len({concept for concept, _ in found})
    told = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    return f"Average precision of the judge on unedited pictures, {of(concepts, 'concept')}: {told}. "
