"""The report as one HTML page that needs no network: verdicts, tables, figures and pictures, also for a phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from lit_unlearn.evaluation.metrics import harmonic_mean
from lit_unlearn.reports.attack_tables import attacks_markdown
from lit_unlearn.reports.figures import spectrum_figure
from lit_unlearn.reports.notes import notes
from lit_unlearn.reports.report import (
    SEEDS,
    Group,
    RunResult,
    by_protocol,
    group,
    made_by,
    paper_markdown,
    protocol_line,
    separately,
)
from lit_unlearn.reports.report_figures import cost_figure, heat_map_figure, robustness_figure, tradeoff_figure
from lit_unlearn.reports.summary import seeds_markdown, summaries_markdown
from lit_unlearn.reports.verdicts import LIMITS

BROAD = 9
"""Figures of more inches take the whole width of the page; others stand two in a row where there is room."""


def report_html(runs: Sequence[RunResult], grids: int = 1) -> str:
    """The report as one page that contains its styles, figures and pictures.

    Args:
        runs: The runs; those of each protocol have a section of their own.
        grids: Number of runs of each method whose ``grid.png`` is shown.
    """
    template = resources.files("lit_unlearn.reports").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = [
        {
            "title": title,
            "protocol": protocol_line(of_protocol),
            "notes": notes([(run.folder, run.scores) for run in of_protocol]),
            "parts": [_html_part(part, grids) for part in group(of_protocol)],
            "paper": Markup(_table(paper_markdown())) if of_protocol[0].scores.concepts.name == "paper20" else None,
        }
        for title, of_protocol in by_protocol(runs).items()
    ]
    return environment.from_string(template).render(
        made=made_by(),
        sections=sections,
        separately=separately(len(sections)),
        seeds_say=SEEDS,
        limits=LIMITS,
        level=2 if len(sections) == 1 else 3,
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
        "verdicts": part.verdicts,
        "tables": [Markup(_table(text)) for text in summaries_markdown(rows).split("\n\n")],
        "seeds": Markup(_table(seeds)) if (seeds := seeds_markdown([run.scores for run in part.runs])) else None,
        "attacks": Markup(_table(attacks_markdown(part.attack_results))) if part.attacks else None,
        "figures": [(title, Markup(_svg(figure)), figure.get_figwidth() > BROAD) for title, figure in figures],
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
