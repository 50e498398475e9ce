"""How much faster two processes are than one, at the same global batch: fit and test under DDP, a thread each.

    python benchmarks/scaling.py --output docs/results/scaling.md

The clock starts when Lightning has set up processes and model, and stops at the end of the last step or edit: what a
long run spends its time on. Efficiency is the time of one process over the processes' number times theirs. Every run is
repeated and the fastest counts, since other work on the machine can only slow a run down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import lightning as L
from quiet import QUIET

RECIPES = {
    "null_space.yaml": ["--data.init_args.batch_size", "32"],
    "esd.yaml": ["--data.init_args.batch_size", "16", "--trainer.max_epochs", "1", "--data.init_args.steps", "40"],
    "concept_ablation.yaml": ["--trainer.max_epochs", "1", "--data.init_args.steps", "40"],
}
"""Recipe -> options: few steps, and a global batch that two processes share evenly and that fills them."""


class Clock(L.Callback):
    """Writes the seconds of fit and test into a file; first among callbacks, so that the others' work is within."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        self.started = time.perf_counter()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(time.perf_counter() - self.started))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_end(trainer, pl_module)


def seconds(command: str, recipe: str, options: list[str], processes: int, folder: Path) -> float:
    """Run ``lit-unlearn COMMAND`` with some processes; return what the clock says.

    Raises:
        RuntimeError: It failed; the log says why.
    """
    clock = folder / "seconds.json"
    clock.unlink(missing_ok=True)
    edits = {"null_space.yaml": "NullSpaceEdit, "}.get(recipe, "")
    callbacks = f"[{{class_path: scaling.Clock, init_args: {{path: {clock}}}}}, {edits}EvaluationReport]"
    arguments = ["--config", recipe, "--concept", "dog", *QUIET, *options, "--trainer.callbacks", callbacks]
    arguments += ["--trainer.default_root_dir", str(folder / f"{processes}"), "--trainer.devices", str(processes)]
    arguments += ["--trainer.accelerator", "cpu", "--data.init_args.images_per_prompt", "1"]
    arguments += ["--trainer.strategy", "ddp"] if processes > 1 else []
    arguments += ["--overwrite"] if command == "test" else ["--fresh"]
    places = [Path(__file__).parent, Path(__file__).parents[1]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    log = folder / "output.log"
    with log.open("a") as file:
        command_line = [sys.executable, "-m", "lit_unlearn", command, *arguments]
        status = subprocess.run(command_line, stdout=file, stderr=file, env=environment, check=False).returncode
    if status:
        raise RuntimeError(f"{command} of {recipe} failed: see {log}.")
    return float(json.loads(clock.read_text()))


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="logs/bench/scaling")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--commands", nargs="+", default=["fit", "test"], choices=["fit", "test"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    several = arguments.processes
    lines = [
        f"Made on {date.today()} by `python benchmarks/scaling.py`, one thread per process, gloo; fastest of "
        f"{arguments.repeats}.",
        "",
        f"| recipe | command | one process, s | {several} processes, s | efficiency |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for recipe in arguments.recipes:
        for command in arguments.commands:
            runs = {
                n: min(seconds(command, recipe, RECIPES[recipe], n, folder) for _ in range(arguments.repeats))
                for n in (1, several)
            }
            efficiency = runs[1] / (several * runs[several])
            lines.append(f"| {recipe} | {command} | {runs[1]:.1f} | {runs[several]:.1f} | {efficiency:.2f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
