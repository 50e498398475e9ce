"""Measures how much faster two processes are than one, with the same global batch: fit and test, DDP, one thread each.

    python benchmarks/scaling.py --output docs/results/scaling.md

The clock starts when Lightning has set up processes and model, and stops at the end of the last step or edit, since a
long run spends its time there. Each process is bound to its own core, as job schedulers do. Efficiency is the time of
one process divided by the number of processes times their time. The speed of machines changes from minute to minute,
and cores share caches and memory. So three cases run in turn and are only compared to each other: one process, several
processes, and the same number of independent copies of the single process side by side. The slowest copy shows how much
the machine itself slows down. Passes through the UNet, which do not depend on the speed, are counted too. A second
table says where the time of a fit goes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from quiet import QUIET

STEPS = {
    "null_space": [],
    "null_space_refined": [],
    "esd": ["--trainer.max_epochs", "1", "--data.init_args.steps", "40"],
}
"""Recipe -> options that make a fit short."""
CASES = [
    ("null_space_refined", "fit", 64),
    ("null_space_refined", "fit", 15),
    ("esd", "fit", 32),
    ("null_space", "test", 15),
]
"""Recipe, command and global batch of a fit (a test has its own batches of pictures)."""


PHASES = ("before the first step", "steps", "between steps, and after the last")
"""Parts of a fit: reading prompts and drawing; the descent; K1, solves, checkpoints, and a figure at the end."""


class Clock(L.Callback):
    """Writes the seconds of fit and test to a file; it must be the first callback, to include the work of the others.

    Args:
        path: File to write.
        core: Core of the first process; the others use the next cores.
    """

    def __init__(self, path: str, core: int = 0) -> None:
        self.path, self.core = Path(path), core
        self.phases = dict.fromkeys(PHASES, 0.0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(self.core + trainer.local_rank) % len(cores)]})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        self.started = self.marked = time.perf_counter()
        self.phase = PHASES[0]

    def enter(self, phase: str) -> None:
        """Count the time since the last call to the phase that ends now."""
        now = time.perf_counter()
        self.phases[self.phase] += now - self.marked
        self.phase, self.marked = phase, now

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.enter(PHASES[1])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.enter(PHASES[2])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
        pl_module.forwards.count = 0

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        busiest = trainer.strategy.reduce(torch.tensor(float(pl_module.forwards.count)), reduce_op="max")
        if trainer.is_global_zero:
            self.enter("")
            found = {"seconds": self.marked - self.started, "forwards": int(busiest), "phases": self.phases}
            self.path.write_text(json.dumps(found), encoding="utf-8")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_fit_end(trainer, pl_module)


def start(
    recipe: str, command: str, batch_size: int, processes: int, folder: Path, core: int = 0
) -> subprocess.Popen[bytes]:
    """Start ``lit-unlearn COMMAND`` with some processes; the first is bound to ``core``."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / "clock.json"
    clock.unlink(missing_ok=True)
    first = f"{{class_path: scaling.Clock, init_args: {{path: {clock}, core: {core}}}}}"
    arguments = ["--config", f"{recipe}.yaml", "--concept", "dog", *QUIET, *STEPS[recipe]]
    arguments += ["--data.init_args.batch_size", str(batch_size), "--data.init_args.images_per_prompt", "1"]
    arguments += ["--trainer.callbacks", f"[{first}, EvaluationReport]"]
    arguments += ["--trainer.default_root_dir", str(folder), "--trainer.devices", str(processes)]
    arguments += ["--trainer.accelerator", "cpu", *(["--trainer.strategy", "ddp"] if processes > 1 else [])]
    arguments += ["--overwrite"] if command == "test" else ["--fresh"]
    places = [Path(__file__).parent, Path(__file__).parents[1]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    with (folder / "output.log").open("a", encoding="utf-8") as file:
        command_line = [sys.executable, "-m", "lit_unlearn", command, *arguments]
        return subprocess.Popen(command_line, cwd=folder, stdout=file, stderr=file, env=environment)


def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Wait for a run and return the numbers of its clock.

    Raises:
        RuntimeError: The run failed; the log says why.
    """
    if process.wait():
        raise RuntimeError(f"A run failed: see {folder / 'output.log'}.")
    return dict(json.loads((folder / "clock.json").read_text(encoding="utf-8")))


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="logs/bench/scaling")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=None, help="recipes; default: all")
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    several = arguments.processes
    lines = [
        "# Two processes against one" if several == 2 else f"# {several} processes against one",
        "",
        f"Made on {date.today()} by `python benchmarks/scaling.py {' '.join(sys.argv[1:])}`, one thread per process, "
        f"gloo. Medians of {arguments.repeats} turns, with the range.",
        "",
        f"| recipe | command | global batch | one process, s | {several} processes, s | UNet passes, one | busiest of "
        f"{several} | efficiency | {several} copies side by side | efficiency against these |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    where = []
    for recipe, command, batch_size in (case for case in CASES if case[0] in (arguments.only or STEPS)):
        turns = []
        for _ in range(arguments.repeats):
            what = (recipe, command, batch_size)
            one = finish(start(*what, 1, folder / "copy_0"), folder / "copy_0")
            more = finish(start(*what, several, folder / "several"), folder / "several")
            copies = [folder / f"copy_{core}" for core in range(several)]
            if command == "test":  # it tests the same run
                for copy in copies[1:]:
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(copies[0], copy)
            running = [start(*what, 1, copy, core) for core, copy in enumerate(copies)]
            slowest = max(finish(process, copy)["seconds"] for process, copy in zip(running, copies, strict=True))
            turns.append((one, more, slowest))
        efficiency = [one["seconds"] / (several * more["seconds"]) for one, more, _ in turns]
        machine = [one["seconds"] / slowest for one, _, slowest in turns]
        against = [found / limit for found, limit in zip(efficiency, machine, strict=True)]
        cells = [f"{recipe}.yaml", command, str(batch_size) if command == "fit" else ""]
        cells += [f"{statistics.median(turn[place]['seconds'] for turn in turns):.1f}" for place in (0, 1)]
        cells += [f"{turns[0][place]['forwards']:,.0f}" for place in (0, 1)]
        cells += [
            f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
            for found in (efficiency, machine, against)
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if command == "fit":
            for phase in PHASES:
                seconds = [statistics.median(turn[place]["phases"][phase] for turn in turns) for place in (0, 1)]
                share = f"{seconds[0] / (several * seconds[1]):.2f}" if seconds[1] >= 0.05 else ""
                where.append(
                    f"| {recipe}.yaml | {batch_size} | {phase} | {seconds[0]:.1f} | {seconds[1]:.1f} | {share} |"
                )
    lines += [
        "",
        f"| recipe | global batch | part of the fit | one process, s | {several} processes, s | efficiency |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
        *where,
    ]
    print("\n".join(lines[-3 - len(where) :]), flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
