"""Edits and scores concepts of emoji20 with every method: the tables of docs/results/emoji20.md.

    python benchmarks/emoji20.py --processes 2 --data.init_args.images_per_prompt 1

Three protocols, one folder per cell, ``ROOT/<method>/<concepts>/version_0``, as ``fit`` and ``test`` make it:

    single   every concept of the set alone
    five     two sets of five concepts of all kinds, each edited at once
    ten      ten concepts at once

A cell with its ``scores.json`` is skipped and one that was cut short is made anew: an interrupted bench goes on where
it stopped. Cells are made concept by concept, so that an unfinished bench compares methods on the same concepts. With
``--attacks`` each cell of one concept is then attacked; attacks that its ``attacks.json`` has are skipped. What follows
the options is passed on to ``fit`` and ``test``.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import shutil
import sys
import time
from datetime import date
from pathlib import Path

from quiet import QUIET, output_to

RECIPES = (
    "null_space.yaml",
    "null_space_direct.yaml",
    "least_squares.yaml",
    "memit.yaml",
    "null_space_unet.yaml",
    "speed.yaml",
    "uce.yaml",
    "esd.yaml",
    "concept_ablation.yaml",
    "concept_ablation_noise.yaml",
    "forget_me_not.yaml",
)
SINGLE = (
    # Kinds take turns, so that a bench that ends early is still about all of them.
    "dog", "rain", "sketch", "walking", "castle", "sunset", "pixel art", "surfing", "apple", "aurora", "cartoon",
    "dancing", "owl", "neon", "glossy", "sleeping", "soccer ball", "daisy", "cat", "lemon",
)  # fmt: skip
FIVE = (
    ("dog", "castle", "sketch", "rain", "walking"),
    ("apple", "owl", "cartoon", "sunset", "surfing"),
)
TEN = (("dog", "castle", "apple", "owl", "sketch", "cartoon", "rain", "sunset", "walking", "surfing"),)
PROTOCOLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "single": tuple((concept,) for concept in SINGLE),
    "five": FIVE,
    "ten": TEN,
}
TITLES = {"single": "One concept at a time", "five": "Five concepts at once", "ten": "Ten concepts at once"}

Cell = tuple[str, tuple[str, ...], str, tuple[str, ...], list[str] | None]


def cell_folder(root: str | Path, recipe: str, concepts: tuple[str, ...]) -> Path:
    from lit_unlearn.training import run_label

    return Path(root, recipe.removesuffix(".yaml"), run_label(concepts))


def run_cell(cell: Cell) -> str:
    """Fit, test and perhaps attack one method on some concepts, one thread; return a line to print."""
    recipe, concepts, root, extra, attacks = cell
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.recipes import find_recipe
    from lit_unlearn.training import run

    folder = cell_folder(root, recipe, concepts)
    scores = folder / "version_0" / "scores.json"
    seconds = "there already"
    if not scores.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        common = ["--config", str(find_recipe(recipe)), "--concept", json.dumps(list(concepts))]
        common += ["--trainer.default_root_dir", root, *QUIET, *extra]
        forget_peak_memory()
        with output_to(Path(root, "output.log")):
            run(["fit", *common])
            run(["test", *common])
        seconds = f"{time.perf_counter() - started:.0f} s"
    under_attack = ""
    if attacks is not None and len(concepts) == 1:
        from lit_unlearn.attack import attack_run

        results = attack_run(scores.parent / "checkpoints/last.ckpt", attacks or None, existing="keep")
        under_attack = "".join(f" {result.attack} {result.shown:.2f}" for result in results)
    found = Scores.load(scores)
    method = recipe.removesuffix(".yaml")
    scored = f"forget {found.forget:.3f} retain {found.retain:.3f}{under_attack}"
    return f"{method:24} {folder.name:40.40} {scored} ({seconds})"


def forget_peak_memory() -> None:
    """Let the kernel count this process's peak memory anew: a cell should not inherit that of the one before."""
    gc.collect()
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")


def run_cell_or_say(cell: Cell) -> str:
    """As ``run_cell``, but a cell that fails is a line, and the bench goes on; its folder has no scores."""
    try:
        return run_cell(cell)
    except Exception as error:  # the bench reports any failure of a method and tries the next
        return f"FAILED {cell[0]} {', '.join(cell[1])}: {type(error).__name__}: {error}"


def summary(root: Path, recipes: list[str], protocols: list[str], command: str) -> str:
    """Markdown: for each protocol a row per method with what was measured so far, then the single concepts."""
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.evaluation.summary import summaries_markdown, summarise
    from lit_unlearn.evaluation.tables import summary_markdown

    lines = [f"Made on {date.today()} by `{command}`, one thread per run.", ""]
    details = []
    for protocol in protocols:
        rows, everything = [], []
        for recipe in recipes:
            paths = [cell_folder(root, recipe, c) / "version_0" / "scores.json" for c in PROTOCOLS[protocol]]
            runs = [Scores.load(path) for path in paths if path.exists()]
            if not runs:
                continue
            everything += runs
            rows.append(summarise(runs))
            if protocol == "single":
                details += [f"### {runs[0].method}", "", summary_markdown(runs)]
        if rows:
            lines += [f"## {TITLES[protocol]}", ""]
            unedited = list({run.edited[0]: run for run in everything}.values())
            lines += [summaries_markdown([summarise(unedited, before=True), *rows])]
    return "\n".join([*lines, "## Each concept", "", *details]) + "\n"


def main() -> None:
    """Run the cells that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/emoji20")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--concepts", nargs="+", default=None, help="only these, of the protocol `single`")
    parser.add_argument("--attacks", nargs="*", metavar="NAME", help="attack single concepts: by these, or by all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    parser.add_argument("--summary_only", action="store_true", help="run nothing, only write the tables")
    arguments, extra = parser.parse_known_args()

    root = Path(arguments.root)
    root.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    for protocol in arguments.protocols:
        for concepts in PROTOCOLS[protocol]:
            if protocol == "single" and arguments.concepts and concepts[0] not in arguments.concepts:
                continue
            cells += [(recipe, concepts, str(root), tuple(extra), arguments.attacks) for recipe in arguments.recipes]
    if not arguments.summary_only:
        # Fresh processes, since torch's threads do not survive a fork; a few cells each, so that memory is given back.
        context = multiprocessing.get_context("spawn")
        with context.Pool(arguments.processes, maxtasksperchild=12) as pool:
            for line in pool.imap_unordered(run_cell_or_say, cells):
                print(line, flush=True)
    command = "python benchmarks/emoji20.py " + " ".join(sys.argv[1:])
    text = summary(root, arguments.recipes, arguments.protocols, command)
    print(text.split("\n## Each")[0])
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    main()
