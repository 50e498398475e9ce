"""Makes one report of many runs: Markdown, CSV, and one HTML page that needs no network.

Data flow: folders are searched for ``scores.json`` (and ``attacks.json`` beside it); runs are sorted into groups by how
many concepts they edit at once; each group becomes tables (``summary``), figures (``report_figures``) and pictures.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from lit_unlearn.evaluation.metrics import both_harmonic_means, harmonic_mean
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.reports.attack_results import FILE as ATTACKS_FILE
from lit_unlearn.reports.attack_results import AttackReport, AttackResult
from lit_unlearn.reports.attack_tables import attacks_markdown, by_label
from lit_unlearn.reports.figures import spectrum_figure
from lit_unlearn.reports.notes import notes
from lit_unlearn.reports.paper import load_challenge_baselines, load_paper_tables
from lit_unlearn.reports.report_figures import cost_figure, heat_map_figure, robustness_figure, tradeoff_figure
from lit_unlearn.reports.summary import (
    MethodSummary,
    seeds_markdown,
    summaries_markdown,
    summarise,
)
from lit_unlearn.reports.tables import concepts_markdown

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


def collect(folders: Sequence[str | Path]) -> list[RunResult]:
    """Read all tested runs below ``folders``.

    Raises:
        ValueError: A folder does not exist or contains no tested run, a file cannot be read, or runs differ in concept
            set, judge or number of pictures.
    """
    runs: list[RunResult] = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"report: there is no folder {folder}.")
        paths = [folder] if folder.name == "scores.json" else sorted(folder.rglob("scores.json"))
        if not paths:
            raise ValueError(f"report: {folder} holds no scores.json; `lit-unlearn test` writes one into each run.")
        runs += [RunResult(path.parent, Scores.load(path), _read_attacks(path.parent)) for path in paths]
    runs = list({run.folder.resolve(): run for run in runs}.values())
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


def group(runs: Sequence[RunResult]) -> list[Group]:
    """Sort runs by how many concepts they edit at once."""
    numbers = sorted({len(run.scores.edited) for run in runs})
    return [Group(number, [run for run in runs if len(run.scores.edited) == number]) for number in numbers]


def report_markdown(runs: Sequence[RunResult]) -> str:
    """The report's tables as Markdown."""
    first = runs[0].scores
    lines = ["# Report", "", _protocol_line(runs), ""]
    lines += [line for note in notes([(run.folder, run.scores) for run in runs]) for line in (note, "")]
    for part in group(runs):
        unedited = part.unedited
        rows = ([unedited] if unedited else []) + part.summaries
        lines += [f"## {part.title}", "", summaries_markdown(rows)]
        if seeds := seeds_markdown([run.scores for run in part.runs]):
            lines += ["### Seeds", "", SEEDS, "", seeds]
        if part.attacks:
            lines += ["### Under attack", "", attacks_markdown(part.attack_results)]
        if part.number == 1:
            lines += ["### Each concept: forget / retain", "", concepts_markdown([run.scores for run in part.runs])]
    if first.concepts.name == "paper20":
        lines += ["## The paper's figures", "", paper_markdown()]
    return "\n".join(lines) + "\n"


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


def report_html(runs: Sequence[RunResult], grids: int = 1) -> str:
    """The report as one page that contains its styles, figures and pictures.

    Args:
        runs: Runs of one protocol.
        grids: Number of runs of each method whose ``grid.png`` is shown.
    """
    template = resources.files("lit_unlearn.reports").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    parts = [_html_part(part, grids) for part in group(runs)]
    paper = Markup(_table(paper_markdown())) if runs[0].scores.concepts.name == "paper20" else None
    page = environment.from_string(template)
    return page.render(
        protocol=_protocol_line(runs),
        parts=parts,
        paper=paper,
        seeds_say=SEEDS,
        notes=notes([(run.folder, run.scores) for run in runs]),
    )


def _html_part(part: Group, grids: int) -> dict[str, Any]:
    unedited, summaries = part.unedited, part.summaries
    rows = ([unedited] if unedited else []) + summaries
    figures = [("Forget and retain", tradeoff_figure(rows)), ("Robustness", robustness_figure(rows, part.attacks))]
    if part.number == 1:
        figures.append(("Harmonic mean by concept", heat_map_figure(_harmonic_means(part))))
    figures.append(("Cost", cost_figure(summaries)))
    spectra = [(run, run.scores.edit["spectrum"]) for run in part.runs if run.scores.edit.get("spectrum")]
    if spectra:
        run, spectrum = spectra[0]
        layers = run.scores.edit.get("layers", {})
        cutoffs = {name: _cutoff(values, layers.get(name, {})) for name, values in spectrum.items()}
        short = {name: name.removesuffix(".weight").replace("text_encoder.encoder.", "") for name in spectrum}
        figure = spectrum_figure(
            {short[n]: values for n, values in spectrum.items()}, {short[n]: cutoffs[n] for n in spectrum}
        )
        figures.append((f"Spectra of {run.scores.method} on {', '.join(run.scores.edited)}", figure))
    pictures = [
        (f"{method}: {', '.join(run.scores.edited)}", _picture_uri(run.folder / "grid.png"))
        for method, of_method in part.methods.items()
        for run in [run for run in of_method if (run.folder / "grid.png").is_file()][:grids]
    ]
    return {
        "title": part.title,
        "tables": [Markup(_table(text)) for text in summaries_markdown(rows).split("\n\n")],
        "seeds": Markup(_table(seeds)) if (seeds := seeds_markdown([run.scores for run in part.runs])) else None,
        "attacks": Markup(_table(attacks_markdown(part.attack_results))) if part.attacks else None,
        "figures": [(title, Markup(_svg(figure))) for title, figure in figures],
        "pictures": pictures,
    }


def _harmonic_means(part: Group) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for method, runs in part.methods.items():
        for concept in dict.fromkeys(run.scores.edited[0] for run in runs):
            scores = [run.scores for run in runs if run.scores.edited[0] == concept]
            found.setdefault(method, {})[concept] = fmean(
                harmonic_mean(s.forget or 0.0, s.retain or 0.0) for s in scores
            )
    return found


def _cutoff(values: Sequence[float], layer: Mapping[str, float]) -> float:
    """The first eigenvalue above the null space, from the dimension of the null space; eigenvalues are ascending."""
    dimension = int(layer.get("null_space_dimension", 0))
    return values[dimension] if dimension < len(values) else float("inf")


def _read_attacks(folder: Path) -> list[AttackResult]:
    path = folder / ATTACKS_FILE
    return AttackReport.load(path).attacks if path.is_file() else []


def _protocol_line(runs: Sequence[RunResult]) -> str:
    first = runs[0].scores
    models = ", ".join(dict.fromkeys(run.scores.backbone.name for run in runs))
    seeds = sorted({run.scores.seed for run in runs})
    return (
        f"{len(runs)} runs on {models}; concept set {first.concepts.name}, {first.images_per_concept} pictures per "
        f"concept, judge {first.judge}, evaluation seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. "
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
    return f"Average precision of the judge on unedited pictures, {concepts} concepts: {told}. "


def _table(markdown: str) -> str:
    """HTML of a pipe table, with the lines before it as a paragraph."""
    lines = markdown.strip().splitlines()
    text = " ".join(line for line in lines if not line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = rows
    out = [f"<p>{html.escape(text)}</p>"] if text else []
    out.append(
        "<table><thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>"
    )
    out += ["<tr>" + "".join(f"<td>{html.escape(html.unescape(cell))}</td>" for cell in row) + "</tr>" for row in body]
    return "".join([*out, "</tbody></table>"])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _picture_uri(path: Path) -> str:
    """The picture at ``path`` as WebP for a page: a third of the size of the PNG in the run's folder."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
