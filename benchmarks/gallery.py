"""Draws the pictures of docs/gallery.md: the same prompts and seeds without an edit and with each method's.

    python benchmarks/gallery.py

Edits that are missing below ``--root`` are made first; with none there it takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from leaders import edited, load

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.system.pixels import save_png

METHODS = ("null_space", "null_space_robust", "uce", "speed", "memit")
CONCEPTS = ("dog", "surfing", "sketch", "rain")
OTHERS = ("cat", "castle", "sunset")
SEED, STEPS, GUIDANCE = 40_000_000, 8, 4.0


def main() -> None:
    """Make edits and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("logs/bench/leaders"))
    parser.add_argument("--output", type=Path, default=Path("docs/gallery"))
    arguments = parser.parse_args()
    root = arguments.root.absolute()
    arguments.output.mkdir(exist_ok=True)
    concepts = load_concept_set("emoji20")
    for concept in CONCEPTS:
        item = concepts.get(concept)
        prompts = [item.direct[0], item.direct[1], item.indirect[0], item.indirect[1]]
        prompts += [concepts.get(other).direct[0] for other in OTHERS]
        seeds = [SEED + row for row in range(len(prompts))]
        pipelines = [load_pipeline("emoji-sd"), *(load(edited(method, [concept], root))[0] for method in METHODS)]
        columns = [pipeline.draw(prompts, seeds, STEPS, GUIDANCE) for pipeline in pipelines]
        rows = [[column[row] for column in columns] for row in range(len(prompts))]
        labels = ["unedited", *(name.replace("null_space_robust", "robust") for name in METHODS)]
        grid = image_grid([torch.stack(row) for row in rows], prompts, labels, scale=2)
        save_png(arguments.output / f"{concept}.png", grid)


if __name__ == "__main__":
    main()
