r"""Edits and scores concepts of emoji20 with every method: the tables of docs/results/emoji20.md.

    python benchmarks/emoji20.py --processes 2 --concepts dog rain sketch walking --attacks \
        --training_seeds 0 1 2 --evaluation_seeds 0 1000 2000 --data.init_args.images_per_prompt 1 \
        --output docs/results/emoji20.md

takes about an hour and a half on two cores (half of the sum of the cells' seconds). Without ``--concepts`` it also runs
the other sixteen concepts, each alone.

There are three protocols, with one folder per cell, ``ROOT/<method>/<concepts>/version_0``, as ``fit`` and ``test``
make it:

    single   every concept of the set alone
    five     two sets of five concepts of all kinds, each set edited at once
    ten      ten concepts edited at once

``--training_seeds`` repeats every edit with other seeds, below ``ROOT/training_<seed>``, except for methods without
random numbers. ``--evaluation_seeds`` draws other pictures of the edits with the first training seed, below
``ROOT/evaluation_<seed>``. The first seed of each list is used for the cells in ``ROOT`` itself. Both options apply to
the protocols of ``--repeat``.

A cell with ``scores.json`` is skipped and an incomplete one is made again, so an interrupted bench continues where it
stopped. Cells are made concept by concept, so that an unfinished bench compares methods on the same concepts. With
``--attacks`` each cell with one concept and the first seeds is then attacked; attacks that are already in its
``attacks.json`` are skipped. Further arguments are passed on to ``fit`` and ``test``.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from quiet import QUIET, output_to

from lit_unlearn.reports.report import collect, report_markdown
from lit_unlearn.system.names import joint_name

RECIPES = (
    "null_space_refined.yaml",
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
    # Kinds take turns, so that a bench that is stopped early still covers all of them.
    "dog", "rain", "sketch", "walking", "castle", "sunset", "pixel art", "surfing", "apple", "aurora", "cartoon",
    "dancing", "owl", "neon", "glossy", "sleeping", "soccer ball", "daisy", "cat", "lemon",
)  # fmt: skip
FIVE = (
    ("dog", "castle", "sketch", "rain", "walking"),
    ("apple", "owl", "cartoon", "sunset", "surfing"),
)
SETTINGS = {
    # Some of the ten are each other's anchors, so the recipe refuses the live model as their reference.
    ("concept_ablation.yaml", 10): ("--model.init_args.reference", "frozen"),
}
"""Recipe and number of concepts -> options that the recipe needs with so many."""
TEN = (("dog", "castle", "apple", "owl", "sketch", "cartoon", "rain", "sunset", "walking", "surfing"),)
PROTOCOLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "single": tuple((concept,) for concept in SINGLE),
    "five": FIVE,
    "ten": TEN,
}


@dataclass(frozen=True)
class Cell:
    """A method on some concepts with two seeds; ``attacks`` is None for no attack, empty for all attacks."""

    recipe: str
    concepts: tuple[str, ...]
    root: Path
    training_seed: int = 0
    evaluation_seed: int = 0
    edit_of: Path | None = None
    """Root of the cell whose edit is tested with other pictures; None to make a new edit."""
    attacks: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the method and the concepts; the runs are below it."""
        return self._folder(self.root)

    @property
    def scores(self) -> Path:
        """File with the scores of the cell."""
        return self.folder / "version_0" / "scores.json"

    def _folder(self, root: Path) -> Path:
        return root / self.recipe.removesuffix(".yaml") / joint_name(self.concepts)

    def make(self, extra: Sequence[str]) -> None:
        """Fit and test, or test the edit of another cell."""
        from lit_unlearn.training.cli import run
        from lit_unlearn.training.recipes import find_recipe

        shutil.rmtree(self.folder, ignore_errors=True)
        common = ["--config", str(find_recipe(self.recipe)), "--concept", json.dumps(list(self.concepts))]
        common += ["--trainer.default_root_dir", str(self.root), *QUIET, *extra]
        common += SETTINGS.get((self.recipe, len(self.concepts)), ())
        common += ["--seed_everything", str(self.training_seed), "--data.init_args.seed", str(self.evaluation_seed)]
        with output_to(self.root / "output.log"):
            if self.edit_of is None:
                run(["fit", *common])
            else:
                edit = Path("version_0", "checkpoints", "last.ckpt")
                (self.folder / edit).parent.mkdir(parents=True)
                shutil.copyfile(self._folder(self.edit_of) / edit, self.folder / edit)
            run(["test", *common])


def has_seed(recipe: str) -> bool:
    """Whether the recipe's method uses random numbers."""
    import inspect

    import yaml

    from lit_unlearn.training.classes import known_classes, prepare
    from lit_unlearn.training.recipes import find_recipe

    prepare()
    name = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))["model"]["class_path"]
    bases = known_classes()[name].__mro__[:-1]
    return any("seed" in inspect.signature(kind.__init__).parameters for kind in bases)


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return all cells, beginning with the first seeds of all concepts."""
    root, first = Path(arguments.root), (arguments.training_seeds[0], arguments.evaluation_seeds[0])
    attacks = None if arguments.attacks is None else tuple(arguments.attacks)

    def wanted(protocols: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (recipe, concepts)
            for protocol in protocols
            for concepts in PROTOCOLS[protocol]
            if protocol != "single" or not arguments.concepts or concepts[0] in arguments.concepts
            for recipe in arguments.recipes
        ]

    again = wanted([protocol for protocol in arguments.protocols if protocol in arguments.repeat])
    cells = [
        Cell(recipe, c, root, *first, attacks=attacks if len(c) == 1 else None)
        for recipe, c in wanted(arguments.protocols)
    ]
    for seed in arguments.training_seeds[1:]:
        where = root / f"training_{seed}"
        cells += [Cell(recipe, c, where, seed, first[1]) for recipe, c in again if has_seed(recipe)]
    for seed in arguments.evaluation_seeds[1:]:
        where = root / f"evaluation_{seed}"
        cells += [Cell(recipe, c, where, first[0], seed, edit_of=root) for recipe, c in again]
    return cells


def run_cell(cell: Cell, extra: Sequence[str]) -> str:
    """Fit, test and, if wanted, attack one method on some concepts, with one thread; return a line to print."""
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.evaluation.scores import Scores

    seconds = "there already"
    if not cell.scores.exists():
        started = time.perf_counter()
        forget_peak_memory()
        cell.make(extra)
        seconds = f"{time.perf_counter() - started:.0f} s"
    under_attack = ""
    if cell.attacks is not None:
        from lit_unlearn.attacks.run import attack_run

        results = attack_run(cell.scores.parent / "checkpoints/last.ckpt", cell.attacks or None, existing="keep")
        under_attack = "".join(f" {result.attack} {result.shown:.2f}" for result in results)
    found = Scores.load(cell.scores)
    scored = f"forget {found.forget:.3f} retain {found.retain:.3f}{under_attack}"
    return (
        f"{cell.folder.relative_to(cell.root)!s:60.60} {cell.training_seed} {cell.evaluation_seed} {scored} ({seconds})"
    )


def forget_peak_memory() -> None:
    """Reset the kernel's peak memory of this process, so that it does not include the cell before."""
    gc.collect()
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5", encoding="utf-8")


def run_cell_or_say(cell: Cell, extra: Sequence[str]) -> str:
    """As ``run_cell``, but return a line if the cell fails, so that the bench continues; its folder has no scores."""
    try:
        return run_cell(cell, extra)
    except Exception as error:  # any failure of a method is reported, and the bench continues
        return f"FAILED {cell.folder}: {type(error).__name__}: {error}"


def summary(cells: Sequence[Cell], command: str) -> str:
    """Return Markdown with the report's tables of the finished cells."""
    folders = [cell.scores.parent for cell in cells if cell.scores.exists()]
    if not folders:
        return "No cell is done.\n"
    missing = len(cells) - len(folders)
    lines = [
        "# emoji20: every method on the same bench",
        "",
        f"Made on {date.today()}, one thread per run, by",
        "",
        f"    {command}",
        "",
        f"{len(folders)} of {len(cells)} cells are done." if missing else f"All {len(cells)} cells are done.",
        "What it says: [comparison.md](../comparison.md).",
        "",
        "",
    ]
    return report_markdown(collect(folders)).replace("# Report\n\n", "\n".join(lines), 1)


def main() -> None:
    """Run the cells that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/emoji20")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--concepts", nargs="+", default=None, help="only these, for the protocol `single`")
    parser.add_argument("--attacks", nargs="*", metavar="NAME", help="attack single concepts: by these, or by all")
    parser.add_argument("--repeat", nargs="+", default=["five"], choices=list(PROTOCOLS), help="run with all seeds")
    parser.add_argument("--training_seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--evaluation_seeds", nargs="+", type=int, default=[0], help="about 1000 apart: one per prompt")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    parser.add_argument("--summary_only", action="store_true", help="do not run anything, only write the tables")
    arguments, extra = parser.parse_known_args()

    root = Path(arguments.root)
    root.mkdir(parents=True, exist_ok=True)
    cells = make_cells(arguments)
    if not arguments.summary_only:
        # New processes, since torch's threads do not survive a fork; a few cells each, so that memory is freed.
        context = multiprocessing.get_context("spawn")
        with context.Pool(arguments.processes, maxtasksperchild=12) as pool:
            for line in pool.imap_unordered(partial(run_cell_or_say, extra=extra), cells):
                print(line, flush=True)
    given = [argument for argument in sys.argv[1:] if argument != "--summary_only"]
    command = f"python benchmarks/emoji20.py {shlex.join(given)}"
    text = summary(cells, command)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
