r"""When values found through the UNet earn their cost: places, values and pairs of the null-space edit.

    python benchmarks/guided_values.py --output docs/results/guided_values.md

edits single concepts of emoji20 in the last text layer and in all but the first, with values from the target prompts'
states (``residual``) and with values refined by gradient descent through the UNet (``refined``), from the set's 15
pairs and from one pair, the two names. A cell with its scores is skipped, so that an interrupted run goes on. It takes
about half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from leaders_tables import number, share, table
from quiet import QUIET, output_to

CONCEPTS = ("dog", "castle", "apple", "walking", "sketch", "rain")
VARIANTS = {
    "last layer, residual": ("null_space.yaml", []),
    "last layer, refined": ("null_space_refined.yaml", ["--model.first_layer", "-1", "--data.steps", "8"]),
    "all but the first, residual": ("null_space.yaml", ["--model.first_layer", "1"]),
    "all but the first, refined": ("null_space_refined.yaml", []),
}
PAIRS = {"15 pairs": "prompts", "one pair": "names"}


def scores(variant: str, pairs: str, concept: str, root: Path) -> dict[str, Any]:
    """Scores of an edit; it is made and tested if it has none."""
    from lit_unlearn.training.cli import run
    from lit_unlearn.training.recipes import find_recipe

    recipe, options = VARIANTS[variant]
    name = f"{variant}, {pairs}".replace(", ", "-").replace(" ", "_")
    run_folder = root / name / concept / "version_0"
    if not (run_folder / "scores.json").exists():
        shutil.rmtree(run_folder, ignore_errors=True)
        common = ["--config", str(find_recipe(recipe)), "--concept", concept, "--method", name, *QUIET]
        common += ["--model.pairs", PAIRS[pairs], *options, "--data.images_per_prompt", "1"]
        common += ["--trainer.default_root_dir", str(root)]
        with output_to(root / "output.log"):
            run(["fit", *common])
            run(["test", *common, "--ckpt_path", str(run_folder / "checkpoints" / "last.ckpt")])
    found: dict[str, Any] = json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))
    return found


def row(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table: means over the concepts."""
    edited = [score for scores in found for score in scores["per_concept"].values() if score["edited"]]
    pictures = sum(score["n"] for score in edited)
    others = sum(score["n"] for scores in found for score in scores["per_concept"].values()) - pictures
    return [
        name,
        share(fmean(scores["direct"]["forget"] for scores in found), pictures // 2),
        share(fmean(scores["indirect"]["forget"] for scores in found), pictures // 2),
        share(fmean(scores["retain"] for scores in found), others),
        number(fmean(scores["drift"]["rmse"] for scores in found), 4),
        number(fmean(scores["cost"]["unet_forwards"] for scores in found), 0),
        number(fmean(scores["cost"]["seconds"] for scores in found), 1),
    ]


def main() -> None:
    """Make what is missing, and write the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/guided_values")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(arguments.root).absolute()
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for pairs in PAIRS:
        for variant in VARIANTS:
            found = [scores(variant, pairs, concept, root) for concept in arguments.concepts]
            rows.append(row(f"{variant}, {pairs}", found))
            print(" | ".join(rows[-1]), flush=True)
    header = ["", "forget, named", "forget, described", "retain", "drift", "UNet forwards", "seconds of the fit"]
    text = (
        "# When values found through the UNet earn their cost\n\n"
        f"By `python benchmarks/guided_values.py`: means over {', '.join(arguments.concepts)}, each edited alone.\n"
        "*named* are prompts with the concept's name, *described* those without it; none is among the pairs.\n\n"
        f"{table(header, rows)}\n"
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
