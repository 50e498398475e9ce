"""Unlearns memorised drawings with every method of data unlearning: docs/results/data_unlearning.md and its figure.

    python benchmarks/data_unlearning.py --output docs/results/data_unlearning.md

First makes the model that has memorised them, if it is missing. Each method has a folder, ``ROOT/<method>/version_0``,
as ``lit-unlearn fit`` and ``test`` make it. A folder with ``memorisation.json`` is skipped and an incomplete one is
made again, so an interrupted bench continues where it stopped. Further options are passed to every fit and test.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

from quiet import QUIET, output_to

RECIPES = ("siss.yaml", "two_pass.yaml", "bernoulli.yaml", "erase_diff.yaml", "neg_grad.yaml", "naive_deletion.yaml")
MEMORISE = "emoji/memorise.yaml"
SHOWN = 6
"""Number of pictures of each method in the figure."""


def quietly(log: Path, *commands: list[str]) -> None:
    """Run commands of the trainer with one thread, and write their output to ``log``."""
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.training.cli import run

    with output_to(log):
        for command in commands:
            run(command)


def make_model(model: Path, log: Path, steps: int | None) -> None:
    """Train the model that memorises the drawings; an interrupted training is continued."""
    from lit_unlearn.training.recipes import find_recipe

    command = ["fit", "--config", str(find_recipe(MEMORISE)), *QUIET]
    command += ["--data.init_args.output", str(model / "images")]
    command += ["--trainer.callbacks.init_args.output", str(model)]  # option of the last callback, SavePretrained
    command += [] if steps is None else ["--trainer.max_steps", str(steps)]
    quietly(log, command)


def run_cell(cell: tuple[str, str, str, tuple[str, ...]]) -> str:
    """Fit and test one method; return a line to print."""
    recipe, model, root, extra = cell
    from lit_unlearn.training.recipes import find_recipe

    method = recipe.removesuffix(".yaml")
    folder = Path(root, method)
    result = folder / "version_0" / "memorisation.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        common = ["--config", str(find_recipe(recipe)), "--trainer.default_root_dir", root, *QUIET]
        common += ["--model.init_args.model", model]
        for name in ("keep", "forget", "held_out"):
            common += [f"--data.init_args.{name}", f"{model}/images/{name}"]
        quietly(Path(root, "output.log"), ["fit", *common, *extra], ["test", *common, *extra])
    after = json.loads(result.read_text(encoding="utf-8"))["after"]["forget"]
    copies = ", ".join(f"{space} {after[space]['copies']:.3f}" for space in ("pixels", "features"))
    return f"{method:16} copies in {copies}"


def share(result: dict[str, Any], kind: str, space: str) -> str:
    """Share of copies and its interval, as a table cell."""
    if kind not in result:
        return ""
    low, high = result[kind][space]["interval"]
    return f"{result[kind][space]['copies']:.3f} ({low:.2f}–{high:.2f})"


def row(name: str, result: dict[str, Any], cost: dict[str, Any] | None, edit: dict[str, Any]) -> str:
    """A row of the table."""
    forget, keep = result["forget"], result.get("keep", {})
    cells = [share(result, "forget", "features"), share(result, "forget", "pixels"), share(result, "keep", "features")]
    cells += [f"{part['features']['known_distance']:.2f}" if part else "" for part in (forget, keep)]
    cells += [f"{keep['drift']:.3f}" if keep and cost else ""]
    cells += [f"{edit['weight_change_ratio']:.4f}"] if cost else [""]
    cells += (
        [f"{cost['seconds']:.0f}", str(cost["unet_forwards"]), str(cost["unet_backwards"])] if cost else ["", "", ""]
    )
    return f"| {' | '.join([name, *cells])} |"


def summary(root: Path, recipes: list[str], figure: str, command: str) -> str:
    """Return Markdown with a row per method."""
    methods = [recipe.removesuffix(".yaml") for recipe in recipes]
    found = {}
    for method in methods:
        path = root / method / "version_0" / "memorisation.json"
        if path.exists():
            found[method] = json.loads(path.read_text(encoding="utf-8"))
    first = next(iter(found.values()))
    forget, keep = first["after"]["forget"]["pictures"], first["after"].get("keep", {}).get("pictures", 0)
    images = first["images"]
    lines = [
        "# Data unlearning: every method on the same memorised drawings",
        "",
        f"Made on {date.today()} by `{command}`, one thread per run.",
        f"emoji-sd has memorised {images['forget']['pictures']} drawings, each with its own caption (`{MEMORISE}`);",
        f"{images['keep']['pictures']} other drawings are to be kept. *Copies* is the share of {forget} pictures of",
        f"these captions, and of {keep} pictures of other captions, that are nearer to a drawing to forget than",
        f"{1 - first['copy_quantile']:.0%} of held-out drawings of the same captions, with 95 % intervals: in the",
        "features of the judge, and in pixels. *Unlike drawings* is the mean distance, in features, to the nearest one",
        "to keep or held out: it grows when pictures are like none. *Drift* is the root-mean-square difference of the",
        "same-seed pictures of other captions, in parts of full scale. The same seeds everywhere.",
        "",
        "| method | copies, features | copies, pixels | copies, other captions | unlike drawings | other captions "
        "| drift | change of weights | seconds | UNet forwards | backwards |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        row("not unlearned", first["before"], None, {}),
        *(row(method, result["after"], result["cost"], result["edit"]) for method, result in found.items()),
        "",
        "How many of the pictures of the captions to forget copy each drawing (in features):",
        "",
        f"| method | {' | '.join(image['caption'] for image in first['forget'])} |",
        f"| --- |{' ---: |' * len(first['forget'])}",
        f"| not unlearned | {' | '.join(map(str, first['before']['copied_images']['features']))} |",
        *(
            f"| {method} | {' | '.join(map(str, result['after']['copied_images']['features']))} |"
            for method, result in found.items()
        ),
        "",
        f"![a drawing to forget and pictures of its caption, per method]({figure})",
    ]
    return "\n".join(lines) + "\n"


def draw_figure(root: Path, recipes: list[str], model: Path, path: Path) -> None:
    """Draw a column per caption to forget: the drawing, then one picture of each method with the same seed."""
    import torch

    from lit_unlearn.data.images import load_image, read_folder
    from lit_unlearn.diffusion.base_model import BaseModel
    from lit_unlearn.edits.checkpoint import load_edited, read_edit
    from lit_unlearn.evaluation.grids import image_grid
    from lit_unlearn.system.pixels import save_png

    torch.set_num_threads(1)
    base = BaseModel.find(str(model))
    forget = read_folder(str(model / "images" / "forget"), "forget")[:SHOWN]
    captions = [image.caption for image in forget]
    rows, labels = [torch.stack([load_image(image.path, 48) for image in forget])], ["drawing to forget"]
    for method in [None, *(recipe.removesuffix(".yaml") for recipe in recipes)]:
        ckpt_path = root / str(method) / "version_0" / "checkpoints" / "last.ckpt"
        if method is not None and not ckpt_path.exists():
            continue
        edit = read_edit(ckpt_path) if method else None
        components = load_edited(base, edit)
        rows.append(components.draw(captions, list(range(len(captions))), 10, 4.0))
        labels.append(method or "not unlearned")
    save_png(path, image_grid(rows, labels, captions, scale=2))


def main() -> None:
    """Run the missing methods, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/data_unlearning")
    parser.add_argument("--model", default="checkpoints/emoji-sd-memorised", help="folder of the memorised model")
    parser.add_argument("--memorise_steps", type=int, default=None, help="default: as in the recipe")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown to write; the figure goes beside it, as .png")
    parser.add_argument("--summary_only", action="store_true", help="do not run anything, only write existing results")
    arguments, extra = parser.parse_known_args()

    root, model = Path(arguments.root), Path(arguments.model)
    root.mkdir(parents=True, exist_ok=True)
    if not arguments.summary_only:
        # New processes, since torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        if not (model / "model_index.json").exists():
            print(f"Making {model} ...", flush=True)
            with context.Pool(1) as pool:
                pool.apply(make_model, (model, root / "output.log", arguments.memorise_steps))
        cells = [(recipe, str(model), str(root), tuple(extra)) for recipe in arguments.recipes]
        with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
            for line in pool.imap_unordered(run_cell, cells):
                print(line, flush=True)
    output = Path(arguments.output) if arguments.output else root / "data_unlearning.md"
    figure = output.with_suffix(".png")
    text = summary(root, arguments.recipes, figure.name, " ".join(["python", *sys.argv]))
    print(text)
    draw_figure(root, arguments.recipes, model, figure)
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
