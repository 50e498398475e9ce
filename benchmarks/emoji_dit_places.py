r"""Where text is edited in a transformer of Stable Diffusion 3's layout: methods and places on emoji-dit.

    python benchmarks/emoji_dit_places.py --processes 2 --output docs/results/emoji_dit_places.md

makes the tables of docs/results/emoji_dit_places.md. As in ``leaders.py``, a result is stored as soon as it is there,
below ``--root``, and joined into ``--results``, so that the bench goes on where it stopped; ``--edits``, ``--measures``
and ``--concepts`` make a part of it.

    alone     an edit of one concept: forget, retain, drift, and which way carries the concept
    attacks   a learned token and Ring-A-Bell on it, one seed, ten pictures each
    ten       ten concepts at once; what they retain are the set's other ten
    sequence  the ten one after another: null space with all edits so far, the others on top of the model edited before
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from emoji20 import TEN
from leaders import attacked, edited, held, load, sequence, tested
from leaders_tables import attack_share, number, pooled, share, table, took
from stored import add_options, make_stored

MODEL = ("--model.model", "emoji-dit")
CLIP, T5 = r"text_encoder(_2)?\..*fc2\.weight", r"text_encoder_3\..*\.wo\.weight"
ATTACKS = ("concept_inversion", "ring_a_bell")
NUM_PICTURES = 10
MEASURES = ("alone", "ten", "attacks", "sequence")
CONCEPTS = TEN[0]


@dataclass(frozen=True)
class Edit:
    """A recipe, what it edits in words, and the pattern of the weights; the recipe's own pattern if that is empty."""

    recipe: str
    place: str
    pattern: str = ""

    @property
    def options(self) -> list[str]:
        """Options of fit and test besides the model."""
        return ["--model.edited_parameters", self.pattern] if self.pattern else []


EDITS = {
    "null_space": Edit("null_space_context", "context embedder and pooled embedder"),
    "null_space, tokens": Edit("null_space_context", "context embedder", r"context_embedder\.weight"),
    "null_space, pooled": Edit("null_space_context", "pooled embedder", r"text_embedder\.linear_1\.weight"),
    "null_space, CLIP and T5": Edit("null_space", "last layer of each encoder that is read"),
    "null_space, CLIP": Edit("null_space", "last layer of both CLIP that is read", CLIP),
    "null_space, T5": Edit("null_space", "last layer of T5", T5),
    "null_space_robust": Edit("null_space_robust", "context embedder and pooled embedder", "context"),
    "uce": Edit("uce", "context embedder and pooled embedder", "context"),
    "speed": Edit("speed", "context embedder and pooled embedder", "context"),
    "esd": Edit("esd", "keys and values of text in joint attention", "joint-kv"),
}
"""Edits by their label."""


@dataclass(frozen=True)
class Cell:
    """One result: a measure of an edit on one concept, or on all."""

    edit: str
    measure: str
    concept: str = ""

    @property
    def key(self) -> str:
        """Name of the result."""
        return "/".join(filter(None, (self.edit, self.measure, self.concept)))


def make(cell: Cell, root: Path) -> dict[str, Any]:
    """Make a result."""
    edit, name = EDITS[cell.edit], cell.edit.replace(", ", "_").replace(" ", "_")
    options = [*MODEL, *edit.options]
    if cell.measure == "alone":
        return tested(edit.recipe, [cell.concept], root, options, name)
    if cell.measure == "ten":
        found = tested(edit.recipe, CONCEPTS, root, options, name)
        pipeline, _, read = load(edited(edit.recipe, CONCEPTS, root, options, name))
        return {**found, **held(pipeline, read)}
    if cell.measure == "attacks":
        return attacked(edited(edit.recipe, [cell.concept], root, options, name), ATTACKS, NUM_PICTURES)
    together = edit.recipe.startswith("null_space")
    return sequence(edit.recipe, root, CONCEPTS, MODEL, lambda names: edit.options, f"{name}_sequence", together)


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables as Markdown."""
    rows, together, attacks = [], [], []
    for label, edit in EDITS.items():
        done = [concept for concept in CONCEPTS if f"{label}/alone/{concept}" in results]
        found = [results[f"{label}/alone/{concept}"] for concept in done]
        if found:
            pictures = {part: sum(one["pictures"][part] for one in found) for part in ("forget", "retain")}
            rows.append(
                [
                    f"{label}: {edit.place}" + (f" ({len(done)} concepts)" if len(done) < len(CONCEPTS) else ""),
                    *(share(fmean(one[part] for one in found), pictures[part]) for part in ("forget", "retain")),
                    number(fmean(one["drift"] for one in found), 3),
                    number(fmean(one["seconds"] for one in found), 1),
                ]
            )
        cells = [pooled(results, label, "attacks", CONCEPTS, attack_share(name)) for name in ATTACKS]
        if any(cells):
            attacks.append([label, *cells])
        ten = results.get(f"{label}/ten")
        steps = results.get(f"{label}/sequence", {}).get("steps", {}).get("10")
        if ten or steps:
            together.append(
                [
                    label,
                    *(share(ten[part], ten["pictures"][part]) if ten else "" for part in ("forget", "retain")),
                    share(ten["held"], ten["held_pictures"]) if ten else "",
                    number(ten["seconds"], 1) if ten else "",
                    *(share(steps[part], n) if steps else "" for part, n in (("forget", 100), ("relapse", 90))),
                ]
            )
    by_concept = [
        [concept, *(number(results.get(f"{label}/alone/{concept}", {}).get("forget"), 2) for label in EDITS)]
        for concept in CONCEPTS
    ]
    shown = {
        "One concept at a time": (["", "forget", "retain", "drift", "seconds of the fit"], rows),
        "Forget, by concept": (["", *EDITS], by_concept if rows else []),
        "Ten at once, and one after another": (
            ["", "forget", "retain", "held", "seconds", "ten edits: forget", "relapse"],
            together,
        ),
        "Under attack": (["", "learned token", "Ring-A-Bell"], attacks),
    }
    parts = [f"## {title}\n\n{table(header, found)}" for title, (header, found) in shown.items() if found]
    parts.append(took(results))
    return "\n\n".join(parts) + "\n"


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, measure by measure."""
    return [
        Cell(edit, measure, concept)
        for measure in arguments.measures
        for concept in (arguments.concepts if measure in ("alone", "attacks") else [""])
        for edit in arguments.edits
    ]


def main() -> None:
    """Make the results that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "logs/bench/emoji_dit_places", "docs/results/emoji_dit_places.json")
    parser.add_argument("--edits", nargs="+", default=list(EDITS), choices=EDITS)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    arguments = parser.parse_args()
    make_stored(arguments, make_cells(arguments), make, tables, "Methods and places on emoji-dit")


if __name__ == "__main__":
    main()
