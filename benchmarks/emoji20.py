"""Edits and scores every concept of a set with every method: the table of docs/results/emoji20.md.

    python benchmarks/emoji20.py --processes 2

One folder per cell, ``ROOT/<method>/<concept>/version_0``, as ``lit-unlearn fit`` and ``test`` make it. A cell with
its ``scores.json`` is skipped and one that was cut short is made anew: an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean

RECIPES = ("null_space.yaml", "null_space_direct.yaml", "least_squares.yaml")


def run_cell(cell: tuple[str, str, str, tuple[str, ...]]) -> str:
    """Fit and test one method on one concept, one thread; return a line to print."""
    recipe, concept, root, extra = cell
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.recipes import find_recipe
    from lit_unlearn.training import run, run_label

    method = recipe.removesuffix(".yaml")
    folder = Path(root, method, run_label([concept]))
    scores = folder / "version_0" / "scores.json"
    if not scores.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        common = ["--config", str(find_recipe(recipe)), "--concept", concept, "--trainer.default_root_dir", root]
        common += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *extra]
        log = Path(root, "output.log")
        with log.open("a") as file:
            stdout, stderr = os.dup(1), os.dup(2)
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            try:
                run(["fit", *common])
                run(["test", *common])
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os.dup2(stdout, 1), os.dup2(stderr, 2)
        seconds = f"{time.perf_counter() - started:.0f} s"
    else:
        seconds = "there already"
    from lit_unlearn.evaluation.scores import Scores

    found = Scores.load(scores)
    return f"{method:20} {concept:12} forget {found.forget:.3f} retain {found.retain:.3f} ({seconds})"


def summary(root: Path, recipes: list[str], command: str) -> str:
    """Markdown: a row per method, then a table per method."""
    from lit_unlearn.evaluation.metrics import both_harmonic_means
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.evaluation.tables import summary_markdown

    lines = [
        "# emoji20: every concept, every closed-form method",
        "",
        f"Made on {date.today()} by `{command}`, on the embedded model, one thread per run.",
        "Each row is the mean over the 20 concepts, each edited alone; 10 prompts × 2 pictures per concept, the same",
        "seeds everywhere. *Retain* is the share of the other concepts' pictures that show theirs; *relative* is that",
        "over the unedited model's. *Drift* is the root-mean-square difference of same-seed pictures of the other",
        "concepts' prompts, in parts of full scale.",
        "",
        "| method | forget | direct | indirect | retain | relative | HM of averages | average of HMs | least HM "
        "| drift | change of weights | seconds | UNet forwards |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    tables = []
    for recipe in recipes:
        method = recipe.removesuffix(".yaml")
        runs = [Scores.load(path) for path in sorted(root.glob(f"{method}/*/version_0/scores.json"))]
        if not runs:
            continue
        forget, retain = [r.forget or 0.0 for r in runs], [r.retain or 0.0 for r in runs]
        before = [r.before.retain or 0.0 for r in runs if r.before]
        of_averages, average = both_harmonic_means(forget, retain)
        each = [2 * f * r / (f + r) if f + r else 0.0 for f, r in zip(forget, retain, strict=True)]
        if not tables:
            unedited = [r.before.forget or 0.0 for r in runs if r.before]
            hms = both_harmonic_means(unedited, before)
            direct = fmean(r.before.direct.forget or 0.0 for r in runs if r.before)
            indirect = fmean(r.before.indirect.forget or 0.0 for r in runs if r.before)
            lines.append(
                f"| unedited | {fmean(unedited):.3f} | {direct:.3f} | {indirect:.3f} | {fmean(before):.3f} | 1.000 "
                f"| {hms[0]:.3f} | {hms[1]:.3f} |  | 0 | 0 |  |  |"
            )
        lines.append(
            f"| {method} ({len(runs)}) | {fmean(forget):.3f} | {fmean(r.direct.forget or 0 for r in runs):.3f} "
            f"| {fmean(r.indirect.forget or 0 for r in runs):.3f} | {fmean(retain):.3f} "
            f"| {fmean(retain) / fmean(before):.3f} | {of_averages:.3f} | {average:.3f} | {min(each):.3f} "
            f"| {fmean(r.drift['rmse'] for r in runs if r.drift):.4f} "
            f"| {fmean(r.edit['weight_change_ratio'] for r in runs):.3f} "
            f"| {fmean(r.cost.seconds for r in runs if r.cost):.0f} "
            f"| {fmean(r.cost.unet_forwards for r in runs if r.cost):.0f} |"
        )
        tables += ["", f"## {method}", "", summary_markdown(runs)]
    return "\n".join([*lines, *tables]) + "\n"


def main() -> None:
    """Run the cells that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/emoji20")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--concepts", nargs="+", default=None, help="default: all of emoji20")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown file to write, e.g. docs/results/emoji20.md")
    parser.add_argument(
        "--summary_only", action="store_true", help="run nothing, only write the tables of what is there"
    )
    arguments, extra = parser.parse_known_args()

    from lit_unlearn.data.concepts import load_concept_set

    root = Path(arguments.root)
    root.mkdir(parents=True, exist_ok=True)
    concepts = arguments.concepts or list(load_concept_set("emoji20").concepts)
    cells = [(recipe, concept, str(root), tuple(extra)) for concept in concepts for recipe in arguments.recipes]
    if not arguments.summary_only:
        # Fresh processes, since torch's threads do not survive a fork; a few cells each, so that memory is given back.
        context = multiprocessing.get_context("spawn")
        with context.Pool(arguments.processes, maxtasksperchild=12) as pool:
            for line in pool.imap_unordered(run_cell, cells):
                print(line, flush=True)
    text = summary(root, arguments.recipes, "python benchmarks/emoji20.py " + " ".join(sys.argv[1:]))
    print(text.split("\n## ")[0])
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    main()
