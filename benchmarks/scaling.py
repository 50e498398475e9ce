"""How much faster two processes are than one, at the same global batch: fit and test under DDP, a thread each.

    python benchmarks/scaling.py --output docs/results/scaling.md

The clock starts when Lightning has set up processes and model, and stops at the end of the last step or edit: what a
long run spends its time on. Efficiency is the time of one process over the processes' number times theirs. Machines
change their pace from minute to minute, so one and several processes run in turn, each pair has an efficiency of its
own, and the median of them counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import lightning as L
from quiet import QUIET

STEPS = {"null_space": [], "esd": ["--trainer.max_epochs", "1", "--data.init_args.steps", "40"]}
"""Recipe -> options that keep a fit short."""
CASES = [
    ("null_space", "fit", 64),
    ("null_space", "fit", 32),
    ("null_space", "fit", 16),
    ("esd", "fit", 32),
    ("esd", "fit", 16),
    ("esd", "fit", 4),
    ("null_space", "test", 15),
    ("esd", "test", 4),
]
"""Recipe, command and global batch of a fit (a test has batches of pictures of its own)."""


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


def seconds(recipe: str, command: str, batch_size: int, processes: int, folder: Path) -> float:
    """Run ``lit-unlearn COMMAND`` with some processes; return what the clock says.

    Raises:
        RuntimeError: It failed; the log says why.
    """
    clock = folder / "seconds.json"
    clock.unlink(missing_ok=True)
    edits = {"null_space": "NullSpaceEdit, "}.get(recipe, "")
    callbacks = f"[{{class_path: scaling.Clock, init_args: {{path: {clock}}}}}, {edits}EvaluationReport]"
    arguments = ["--config", f"{recipe}.yaml", "--concept", "dog", *QUIET, *STEPS[recipe]]
    arguments += ["--data.init_args.batch_size", str(batch_size), "--trainer.callbacks", callbacks]
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    several = arguments.processes
    lines = [
        "# Two processes against one" if several == 2 else f"# {several} processes against one",
        "",
        f"Made on {date.today()} by `python benchmarks/scaling.py {' '.join(sys.argv[1:])}`, one thread per process, "
        f"gloo. Medians of {arguments.repeats} pairs of runs, and the range of the efficiency.",
        "",
        f"| recipe | command | global batch | one process, s | {several} processes, s | efficiency | range |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for recipe, command, batch_size in CASES:
        runs = {1: [], several: []}
        for _ in range(arguments.repeats):
            for processes, times in runs.items():
                times.append(seconds(recipe, command, batch_size, processes, folder))
        found = sorted(one / (several * more) for one, more in zip(runs[1], runs[several], strict=True))
        one, more = (statistics.median(times) for times in runs.values())
        lines.append(
            f"| {recipe}.yaml | {command} | {batch_size if command == 'fit' else ''} | {one:.1f} | {more:.1f} "
            f"| {statistics.median(found):.2f} | {found[0]:.2f} to {found[-1]:.2f} |"
        )
        print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
