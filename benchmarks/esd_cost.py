"""Compares ESD with every state of a chain to ESD with one state: the table of docs/results/esd_cost.md.

    python benchmarks/esd_cost.py --processes 2 --output docs/results/esd_cost.md

Both take the same number of optimizer steps, on the same concepts and seeds; other options are passed to ``lit-unlearn
fit`` and ``test``. Each cell has one folder, ``ROOT/<states>/seed_<n>/esd/<concept>/version_0``. A cell with
``scores.json`` and ``esd_cost.json`` is skipped and an incomplete one is made again, so an interrupted bench continues
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from quiet import QUIET, output_to

from lit_unlearn.system.names import joint_name

POLICIES = ("all", "one")
HELD_OUT_CHAINS = 30
"""Number of chains of the frozen model for measuring the loss on their states; training does not use these chains."""


def held_out_loss(module: Any) -> tuple[float, float]:
    """Mean squared error against the target on fixed states, of the pretrained and of the edited weights.

    The states depend on the concept, the model and the sampling of the recipe, not on the training or its seed.
    """
    import torch

    from lit_unlearn.core.objectives import esd_target
    from lit_unlearn.diffusion.sampling import seeded
    from lit_unlearn.diffusion.trajectories import sample_chains

    before, after = [], []
    with torch.no_grad():
        for number in range(HELD_OUT_CHAINS):
            conditions = module.conditions(torch.tensor([number % module.num_pairs]))
            noise = module.sampler.initial_noise([seeded("held out", number).initial_seed()])
            with module.pretrained.restored():
                states = sample_chains(module.sampler, conditions, noise, module.num_chain_steps, module.start_guidance)
            inputs, uncond, concept, *erase_from = states[0].unbind(1)  # (S, C, H, W) each
            start = uncond if module.eta_form == "paper" else (*erase_from, concept)[0]
            target = esd_target(start, concept, uncond, module.eta)
            edited = module.pipeline.predict(inputs, module.timesteps, conditions[-1].expand(len(inputs)))
            before.append(float(((*erase_from, concept)[0] - target).square().mean()))
            after.append(float((edited - target).square().mean()))
    return fmean(before), fmean(after)


def run_cell(cell: tuple[str, str, int, str, str, tuple[str, ...]]) -> str:
    """Fit and test one policy on one concept with one seed and one thread; return a line to print."""
    policy, concept, seed, recipe, root, extra = cell
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.system.files import atomic_write
    from lit_unlearn.training.cli import run
    from lit_unlearn.training.recipes import find_recipe

    top = Path(root, policy, f"seed_{seed}")
    folder = top / "esd" / joint_name([concept])
    scores, cost = folder / "version_0" / "scores.json", folder / "version_0" / "esd_cost.json"
    if not (scores.exists() and cost.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        common = ["--config", str(find_recipe(recipe)), "--method", "esd", "--concept", concept]
        common += ["--model.init_args.states_per_chain", policy, "--seed_everything", str(seed)]
        common += ["--trainer.default_root_dir", str(top), *QUIET, *extra]
        started = time.perf_counter()
        with output_to(top / "output.log"):
            cli = run(["fit", *common])
            module = cli.model
            spent = module.current_cost()
            before, after = held_out_loss(module)
            run(["test", *common])
        found = {
            "steps": cli.trainer.global_step,
            "seconds": spent["seconds"],
            "forwards": spent["unet_forwards"],
            "backwards": spent["unet_backwards"],
            "loss_before": before,
            "loss_after": after,
        }
        with atomic_write(cost) as stream:
            stream.write(json.dumps(found, indent=2).encode())
        seconds = f"{time.perf_counter() - started:.0f} s"
    else:
        seconds = "there already"
    row = read_cell(cost.parent)
    return f"{policy:4} {concept:12} seed {seed}: " + " ".join(f"{k} {v:.4g}" for k, v in row.items()) + f" ({seconds})"


def read_cell(folder: Path) -> dict[str, float]:
    """Read the numbers in a cell's folder."""
    from lit_unlearn.evaluation.scores import Scores

    scores, cost = (
        Scores.load(folder / "scores.json"),
        json.loads((folder / "esd_cost.json").read_text(encoding="utf-8")),
    )
    steps = cost["steps"]
    return {
        "steps": steps,
        "forwards": cost["forwards"] / steps,
        "backwards": cost["backwards"] / steps,
        "equivalents": (cost["forwards"] + 2 * cost["backwards"]) / steps,
        "loss_before": cost["loss_before"],
        "loss_after": cost["loss_after"],
        "forget": scores.forget or 0.0,
        "retain": scores.retain or 0.0,
        "seconds": cost["seconds"],
    }


COLUMNS = {
    "steps": ("optimizer steps", "{:.0f}"),
    "forwards": ("forwards a step", "{:.2f}"),
    "backwards": ("backwards a step", "{:.2f}"),
    "equivalents": ("equivalents a step", "{:.2f}"),
    "loss_before": ("held-out loss before", "{:.5f}"),
    "loss_after": ("held-out loss after", "{:.5f}"),
    "forget": ("forget", "{:.3f}"),
    "retain": ("retain", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def summary(root: Path, concepts: list[str], seeds: list[int], command: str) -> str:
    """Return Markdown with means of both policies and their paired differences, then every cell."""
    cells: dict[tuple[str, int, str], dict[str, float]] = {}
    for concept in concepts:
        for seed in seeds:
            folders = {p: root / p / f"seed_{seed}" / "esd" / joint_name([concept]) / "version_0" for p in POLICIES}
            if all((folder / "esd_cost.json").exists() for folder in folders.values()):
                cells |= {(concept, seed, policy): read_cell(folder) for policy, folder in folders.items()}
    lines = [
        "# ESD: every state of a chain, or one",
        "",
        f"Made on {date.today()} by `{command}`, on the embedded model, one thread per run.",
        "",
        "*all* uses every state of the frozen model's chains, with the two predictions that guidance computed there;",
        "*one* samples a chain to a random stop for each state, as the authors' code does. Both take the same number",
        "of optimizer steps. *Forwards* and *backwards* are those of one picture; an *equivalent* is a forward, and a",
        f"backward counts as two. The *held-out loss* is ESD's, on all states of {HELD_OUT_CHAINS} chains of the",
        "frozen model that no run was trained on, the same for both. Means over concepts and seeds, ± the standard",
        "deviation over runs; the last row is the mean difference of runs with the same concept and seed, ± its",
        "standard error.",
        "",
        "| states | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    pairs = sorted({key[:2] for key in cells})
    for policy in POLICIES:
        row = []
        for name, (_, form) in COLUMNS.items():
            values = [cells[(*pair, policy)][name] for pair in pairs]
            spread = f" ± {form.format(stdev(values))}" if len(values) > 1 and name != "steps" else ""
            row.append(form.format(fmean(values)) + spread if values else "")
        lines.append(f"| {policy} ({len(pairs)}) | " + " | ".join(row) + " |")
    row = []
    for name, (_, form) in COLUMNS.items():
        values = [cells[(*pair, "all")][name] - cells[(*pair, "one")][name] for pair in pairs]
        error = f" ± {form.format(stdev(values) / len(values) ** 0.5)}" if len(values) > 1 else ""
        row.append(form.format(fmean(values)) + error if values and name != "steps" else "")
    lines += ["| all − one | " + " | ".join(row) + " |", "", "## Every run", ""]
    lines += ["| concept | seed | states | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines += ["| --- | ---: | --- |" + " ---: |" * len(COLUMNS)]
    for (concept, seed, policy), cell in cells.items():
        numbers = " | ".join(form.format(cell[name]) for name, (_, form) in COLUMNS.items())
        lines.append(f"| {concept} | {seed} | {policy} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/esd_cost")
    parser.add_argument("--recipe", default="esd.yaml")
    parser.add_argument("--concepts", nargs="+", default=["dog", "rain", "sketch"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="Markdown file to write, e.g. docs/results/esd_cost.md")
    parser.add_argument("--summary_only", action="store_true", help="do not run anything, only write existing results")
    arguments, extra = parser.parse_known_args()
    root = Path(arguments.root)
    cells = [
        (policy, concept, seed, arguments.recipe, str(root), tuple(extra))
        for seed in arguments.seeds
        for concept in arguments.concepts
        for policy in POLICIES
    ]
    if not arguments.summary_only:
        # New processes, since torch's threads do not survive a fork; a few cells each, so that memory is freed.
        context = multiprocessing.get_context("spawn")
        with context.Pool(arguments.processes, maxtasksperchild=12) as pool:
            for line in pool.imap_unordered(run_cell, cells):
                print(line, flush=True)
    command = shlex.join(["python", "benchmarks/esd_cost.py", *sys.argv[1:]])
    text = summary(root, arguments.concepts, arguments.seeds, command)
    print(text.split("\n## ")[0])
    if arguments.output:
        from lit_unlearn.system.files import atomic_write

        with atomic_write(arguments.output) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
