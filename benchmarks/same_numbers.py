"""Shows that a refactor keeps every number: runs small versions of all recipes before and after, and compares them.

    python benchmarks/same_numbers.py write before.json      # before the first move
    python benchmarks/same_numbers.py compare before.json    # after the last one; exit code 1 if anything differs

takes about ten minutes on one free core. Both take ``--only PATTERN`` for some of the runs, and ``--tree PATH`` for the
sources of another checkout (``git worktree add --detach PATH COMMIT``), since this file may be newer than the sources
that it measures. ``write`` continues where it was interrupted. ``compare before.json after.json`` runs no recipe.

Recipes are read from ``configs``, so a new one is run as well; overlays, which need another model, are left out. Every
edit is fitted on emoji-sd with few steps, tested, used to predict and generate, and exported in all forms. Pictures to
unlearn are smooth noise, with a copy of emoji-sd that has not memorised anything. Some recipes are run again: with two
concepts (tested in full), attacked, in two processes, and interrupted. The numbers of interrupted runs must also equal
those of uninterrupted ones. Everything is run on the command line and read from files, since a refactor changes the
inside.

It compares the SHA-256 of every weight in the checkpoint, of exported files (tensors, not metadata) and of the pixels
of pictures, every field of the scores except times and memory, and exit codes. The last bits depend on the versions of
packages and on the processor: both are in the file, and ``compare`` prints any difference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numbers_of_run import CLOCKS, COUNTS, Results, checkpoint, collect, differing, report, sha256
from quiet import output_to

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = {
    "max_epochs": 2, "max_steps": 3, "steps": 2, "steps_per_epoch": 2, "batch_size": 4, "images_per_prompt": 1,
    "num_inference_steps": 2, "anchor_inference_steps": 2, "num_chain_steps": 4, "chains": 2, "rounds": 2, "images": 8,
    "num_images": 4, "images_per_phrase": 4, "num_validation": 64, "drawings": 1, "captions": 1, "same_caption": 1,
    "others": 6, "held_out": 2,
}  # fmt: skip
"""Largest value of every number in a recipe with one of these names, at any place."""
TWO_CONCEPTS = ("uce.yaml", "esd.yaml")
TWO_PROCESSES = ("null_space_refined.yaml", "esd.yaml", "uce.yaml")
ATTACKED = ("null_space_refined.yaml", "esd.yaml")
INTERRUPTED = {
    "null_space_refined.yaml": (signal.SIGKILL, ["--data.init_args.steps=3"]),
    "esd.yaml": (signal.SIGUSR1, ["--trainer.max_epochs=4", "--data.init_args.steps=10"]),
}
"""Recipe -> the signal that ends it after its first checkpoint, and options that make it run long enough. With SIGUSR1
it saves in the middle of an epoch."""
SAVED = 75
"""Exit code of a fit that has saved and stopped."""
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Job:
    """A recipe and how it is run."""

    recipe: str
    content: dict[str, Any] = field(repr=False)
    how: str = ""

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.recipe}, {self.how}" if self.how else self.recipe

    @property
    def trains(self) -> bool:
        """Whether it trains a part of emoji-sd instead of editing it."""
        return self.recipe.startswith("emoji/")

    @property
    def unlearns_pictures(self) -> bool:
        """Whether it unlearns pictures instead of a concept."""
        return {"keep", "forget"} <= self.content["data"].get("init_args", {}).keys()

    def options(self) -> list[str]:
        """Options of ``fit``, ``test`` and ``predict``."""
        found = ["--config", self.recipe, *QUIET]
        sections = {"trainer": self.content["trainer"]}
        for part in ("model", "data"):
            sections[f"{part}.init_args"] = self.content[part].get("init_args", {})
        for section, values in sections.items():
            for key, value in values.items():
                if type(value) is int and value > SMALL.get(key, value):
                    found.append(f"--{section}.{key}={SMALL[key]}")
        if not self.trains and not self.unlearns_pictures and not isinstance(self.content.get("concept"), list):
            found += ["--concept", "[dog, apple]" if self.how == "two concepts" else "dog"]
        return found

    def commands(self) -> list[list[str]]:
        """All commands of a run, with ``{checkpoint}`` in place of the checkpoint's path."""
        options = self.options()
        if self.trains:
            return [["fit", *options]]
        few = [] if self.unlearns_pictures or self.how == "two concepts" else ["--trainer.limit_test_batches=1"]
        tested = [["fit", *options], ["test", *options, *few]]
        if self.how in ("two processes", "resumed"):
            return tested
        predict = ["predict", *options, "--trainer.limit_predict_batches=1"]
        predict += [] if self.unlearns_pictures else ["--data.init_args.eval_batch_size=4"]
        of_edit = ["--ckpt_path", "{checkpoint}", "--output"]
        cheap = ["--num_inference_steps", "2", "--device", "cpu"]
        commands = [
            *tested,
            predict,
            ["generate", "look at a dog", "a castle in the rain", *of_edit, "generated.png", *cheap],
            ["export", *of_edit, "export/pipeline"],
            ["export", *of_edit, "export/delta", "--delta"],
            ["export", *of_edit, "export/lora", "--lora", "auto"],
            ["export", *of_edit, "export/half", "--dtype", "float16", "--names", "2022"],
            ["verify", "export/pipeline", "--base", self.content["model"]["init_args"].get("model", "emoji-sd")],
        ]
        if self.recipe in ATTACKED and not self.how:
            budget = ["--num_pictures", "2", "--steps", "2", "--device", "cpu"]
            commands.append(["attack", "--ckpt_path", "{checkpoint}", *budget])
        return commands


def read_jobs(configs: Path) -> list[Job]:
    """Every complete recipe, then those that are run in other ways too."""
    import yaml

    names = sorted(
        (path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")), key=lambda n: ("/" in n, n)
    )
    recipes = {name: yaml.safe_load((configs / name).read_text(encoding="utf-8")) for name in names}
    recipes = {name: content for name, content in recipes.items() if "class_path" in content.get("model", {})}
    jobs = [Job(name, content) for name, content in recipes.items()]
    others = {"two concepts": TWO_CONCEPTS, "two processes": TWO_PROCESSES, "resumed": tuple(INTERRUPTED)}
    return jobs + [Job(name, recipes[name], how) for how, chosen in others.items() for name in chosen]


# ------------------------------------------------------------------------------------------------------------- running


def prepare(job: Job, tree: Path, folder: Path) -> None:
    """Make the folder that a job runs in."""
    folder.mkdir(parents=True)
    if job.trains:  # it reads other parts of the model, and overwrites its own
        shutil.copytree(tree / "checkpoints/emoji-sd", folder / "checkpoints/emoji-sd")
    if job.unlearns_pictures:
        memorised = folder / "checkpoints/emoji-sd-memorised"
        shutil.copytree(tree / "checkpoints/emoji-sd", memorised)
        write_pictures(memorised / "images")


def write_pictures(folder: Path) -> None:
    """Write smooth noise to keep, forget and hold out, with captions, instead of the drawings of ``memorise.yaml``."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    dog, owl, other = "look at a dog", "look at an owl", "a castle in the rain"
    for name, captions in {
        "keep": [dog, dog, owl, owl, other, other],
        "forget": [dog, owl],
        "held_out": [dog] * 4 + [owl] * 4,
    }.items():
        (folder / name).mkdir(parents=True)
        lines = []
        for number, caption in enumerate(captions):
            blocks = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(blocks).resize((48, 48), Image.Resampling.BILINEAR)
            picture.save(folder / name / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def start(folder: Path, function: Callable[[], Any]) -> Any:
    """Run ``function`` in ``folder``, in a fork of this process, since imports take longer than most runs."""

    def work() -> None:
        os.chdir(folder)
        with output_to(folder / "output.log"):
            try:
                function()
            except Exception:  # any error: the log shows it, and the job has failed
                traceback.print_exc()
                sys.exit(3)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait(process: Any, folder: Path, expected: int = 0) -> None:
    """Wait for the end of ``process``, which must have the exit code ``expected``."""
    process.join()
    if process.exitcode != expected:
        raise RuntimeError(f"exit code {process.exitcode} instead of {expected}: {folder / 'output.log'}")


def run_commands(commands: Sequence[Sequence[str]]) -> dict[str, int]:
    """Run commands one after another; return their exit codes. ``fit`` must succeed."""
    from lit_unlearn import cli

    codes = {}
    for command in commands:
        print(f"\n$ {' '.join(command)}", flush=True)
        code = cli.main([part.replace("{checkpoint}", str(checkpoint(Path.cwd()))) for part in command])
        exported = [Path(part).name for part in command if part.startswith("export/")]
        codes[" ".join([command[0], *exported])] = code
        if command[0] == "fit" and code:
            raise RuntimeError(f"fit ends with exit code {code}")
    return codes


def run_alone(command: Sequence[str]) -> None:
    """Run a command and end with its exit code."""
    from lit_unlearn import cli

    sys.exit(cli.main(command))


def run_whole(commands: Sequence[Sequence[str]], leave_out: Sequence[str] = CLOCKS) -> None:
    """Run commands and write ``result.json``."""
    codes = run_commands(commands)
    result = {**collect(Path.cwd(), leave_out), "commands": codes}
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


def run_job(job: Job, tree: Path, folder: Path) -> Results:
    """Run everything that belongs to a job, below ``folder``."""
    commands = job.commands()
    if job.how == "two processes":
        prepare(job, tree, folder)
        two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        two += ["--data.init_args.batch_size=3"] if "batch_size" in job.content["data"]["init_args"] else []
        with (folder / "output.log").open("w", encoding="utf-8") as log:
            for command in commands:
                program = [sys.executable, "-m", "lit_unlearn", *command, *two]
                code = subprocess.run(program, cwd=folder, stdout=log, stderr=log, timeout=600).returncode
                if code:
                    raise RuntimeError(f"{command[0]} ends with exit code {code}: {folder / 'output.log'}")
        wait(start(folder, lambda: run_whole([])), folder)
    elif job.how == "resumed":
        told, more = INTERRUPTED[job.recipe]
        commands = [[*command, *more] for command in commands]
        alone = folder.with_name(f"{folder.name}_alone")
        for path in (alone, folder):
            prepare(job, tree, path)
        wait(start(alone, lambda: run_whole(commands, (*CLOCKS, *COUNTS))), alone)
        process = start(folder, lambda: run_alone(commands[0]))
        while process.is_alive() and checkpoint(folder) is None:
            time.sleep(0.002)
        if process.is_alive():
            os.kill(process.pid, told)
        wait(process, folder, SAVED if told == signal.SIGUSR1 else -told)
        wait(start(folder, lambda: run_whole(commands, (*CLOCKS, *COUNTS))), folder)
    else:
        prepare(job, tree, folder)
        wait(start(folder, lambda: run_whole(commands)), folder)
    result: Results = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if job.how == "resumed":
        left_alone = json.loads((alone / "result.json").read_text(encoding="utf-8"))
        shutil.rmtree(alone)
        result["unlike left alone"] = {kind: differing(left_alone[kind], result[kind]) for kind in result}
    return result


def about(tree: Path) -> dict[str, str]:
    """Versions and hardware that the numbers depend on."""
    import torch

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", tree, *args], capture_output=True, text=True, encoding="utf-8"
        ).stdout.strip()

    measured = [path for top in ("lit_unlearn", "configs", "checkpoints/emoji-sd") for path in tree.glob(f"{top}/**/*")]
    sources = sorted(path for path in measured if path.is_file() and path.suffix != ".pyc")
    bench = [Path(__file__).with_name(name) for name in ("same_numbers.py", "numbers_of_run.py")]
    return {
        "commit": git("rev-parse", "HEAD"),
        "sources": sha256(*(str(path.relative_to(tree)).encode() + path.read_bytes() for path in sources)),
        "bench": sha256(*(path.read_bytes() for path in bench)),
        "python": platform.python_version(),
        "platform": f"{platform.platform()}, {torch.backends.cpu.get_cpu_capability()}",
        **{name: version(name) for name in PACKAGES},
    }


def run_jobs(
    jobs: Sequence[Job], tree: Path, root: Path, done: dict[str, Results], keep: Callable[[], None]
) -> dict[str, str]:
    """Run the jobs that are missing in ``done`` and add them; return an error message for each that failed."""
    failed = {}
    for number, job in enumerate(jobs, 1):
        if job.name in done:
            continue
        started = time.perf_counter()
        folder = root / job.name.replace("/", "_").replace(", ", "_").replace(" ", "_")
        try:
            done[job.name] = run_job(job, tree, folder)
        except (RuntimeError, AssertionError, subprocess.SubprocessError) as error:
            failed[job.name] = str(error)
        else:
            keep()
            shutil.rmtree(folder)
        found = done.get(job.name, {})
        refused = [name for name, code in found.get("commands", {}).items() if code]
        note = failed.get(job.name, f"refused: {', '.join(refused)}" if refused else "")
        for kind, names in found.get("unlike left alone", {}).items():
            note += f"UNLIKE A RUN LEFT ALONE in {kind}: {', '.join(names)}" if names else ""
        print(f"{number}/{len(jobs)} {job.name} ({time.perf_counter() - started:.0f} s) {note}", flush=True)
    return failed


def main() -> None:
    """Write the numbers, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("file", type=Path, help="JSON file with the numbers before")
    parser.add_argument("after", type=Path, nargs="?", help="compare: a second such file, instead of new runs")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="only runs with matching names, e.g. 'uce' or 'two *'"
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="checkout; default: this one")
    arguments = parser.parse_args()

    tree = arguments.tree.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    sys.path.insert(0, str(tree))
    from lit_unlearn import __file__ as package
    from lit_unlearn import cli

    assert Path(package).resolve().is_relative_to(tree), f"{package} is not of {tree}"
    jobs = [job for job in read_jobs(tree / "configs") if fnmatch(job.name, f"*{arguments.only}*")]
    before = json.loads(arguments.file.read_text(encoding="utf-8")) if arguments.file.exists() else {}
    now = about(tree)
    if arguments.what == "compare":
        if not before:
            sys.exit(f"There is no {arguments.file}: `write` makes it.")
        others: dict[str, Any] = (
            json.loads(arguments.after.read_text(encoding="utf-8"))
            if arguments.after
            else {"about": now, "results": {}}
        )
        for name, value in before["about"].items():
            if value != others["about"].get(name):
                print(f"{name}: {value} -> {others['about'].get(name)}")
    elif before and before["about"] != now:
        sys.exit(f"{arguments.file} was begun with other sources or versions: give another name, or delete it.")
    else:
        others = before or {"about": now, "results": {}}

    def keep() -> None:
        if arguments.what == "write":
            part = arguments.file.with_suffix(".part")
            part.write_text(json.dumps(others, indent=1), encoding="utf-8")
            part.replace(arguments.file)

    failed: dict[str, str] = {}
    if not arguments.after:
        root = Path(tempfile.mkdtemp(prefix="same_numbers_"))
        with output_to(root / "output.log"):  # import everything once, for all copies of this process
            assert cli.main(["fit", "--config", "uce.yaml", "--print_config"]) == 0
        failed = run_jobs(jobs, tree, root, others["results"], keep)
        if not failed:
            shutil.rmtree(root)
    if arguments.what == "write":
        print(*(f"{name}: {reason}" for name, reason in failed.items()), sep="\n")
        sys.exit(bool(failed))
    chosen = {name: results for name, results in before["results"].items() if fnmatch(name, f"*{arguments.only}*")}
    after = {name: results for name, results in others["results"].items() if fnmatch(name, f"*{arguments.only}*")}
    sys.exit(not report(chosen, after, failed))


if __name__ == "__main__":
    main()
