"""Kills a fit, its test and its export at random moments, starts them again, and compares to an uninterrupted run.

    python benchmarks/kill.py --kills 30 --output docs/results/kill.md

In every try the three commands are started in a new folder, killed (SIGKILL, the whole process group) after a random
delay within their run time, and started again. A kill is survived if the weights are equal to the last bit, the scores
are equal except for times, and the exported files are equal. Tries alternate between a closed form, which trains V1,
and a gradient method, which has a cache of anchor pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from quiet import QUIET

QUICK = "--model.init_args.num_inference_steps 2 --data.init_args.steps 2 --data.init_args.batch_size 4"
QUICK += f" --data.init_args.images_per_prompt 1 {' '.join(QUIET)}"
RECIPES = {
    "null_space": "--model.init_args.rounds 1 --model.init_args.last_layer 2",
    "concept_ablation": "--model.init_args.images 12 --trainer.max_epochs 3",
}
"""Recipe -> options that make it short."""


def run_of(recipe: str) -> Path:
    """Folder in which the commands put the run."""
    return Path("logs", recipe, "dog", "version_0")


def script(recipe: str) -> str:
    """The three commands, as in a user's script that may be started again."""
    program = f"{sys.executable} -m lit_unlearn"
    options = f"--config {recipe}.yaml --concept dog {RECIPES[recipe]} {QUICK}"
    return "\n".join(
        [
            "set -e",
            f"{program} fit {options} --once",
            f"{program} test {options} --overwrite",
            f"{program} export --ckpt_path {run_of(recipe) / 'checkpoints/last.ckpt'} --output export --overwrite",
        ]
    )


def run(recipe: str, folder: Path, kill_after: float | None = None, once: Path | None = None) -> tuple[float, bool]:
    """Run the script in ``folder``; return how many seconds it took and whether it finished.

    It is killed ``kill_after`` seconds after its start, or after the file ``once`` appears.
    """
    started = time.perf_counter()
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            ["bash", "-c", script(recipe)],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        while once is not None and not once.exists() and process.poll() is None:
            time.sleep(0.005)
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return time.perf_counter() - started, process.returncode == 0


def outcome(recipe: str, folder: Path) -> dict[str, str]:
    """Hashes that must be equal: of edited weights, scores without times, and exported files."""
    from lit_unlearn.diffusion.parameters import fingerprint
    from lit_unlearn.edits.checkpoint import read_edit

    run_folder = folder / run_of(recipe)
    scores = json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))
    scores.pop("cost")
    scores["edit"].get("anchors", {}).pop("made", None)  # also a cost, lower if a killed run has cached some
    found = {
        "weights": fingerprint(read_edit(run_folder / "checkpoints" / "last.ckpt").weights),
        "scores": hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest(),
    }
    for path in sorted((folder / "export").rglob("*")):
        if path.is_file() and path.name not in ("provenance.json", "README.md"):  # these contain times
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def where(recipe: str, folder: Path) -> str:
    """Stage at which a run was killed."""
    if (folder / "export").exists():
        return "after the export"
    run_folder = folder / run_of(recipe)
    if (run_folder / "scores.json").exists():
        return "in the export"
    state = (
        json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["state"]
        if (run_folder / "run.json").exists()
        else ""
    )
    if state == "finished":
        return "in the test"
    if (run_folder / "checkpoints" / "last.ckpt").exists():
        return "in the fit, after a checkpoint"
    return "in the fit, before a checkpoint" if state else "before the fit"


def main() -> None:
    """Kill, start again, compare; write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--root", default="logs/bench/kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", choices=["all", "fit"], default="all", help="commands that are killed")
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    root = Path(arguments.root).absolute()
    shutil.rmtree(root, ignore_errors=True)
    expected, duration = {}, {}
    for recipe in RECIPES:
        reference = root / f"reference_{recipe}"
        reference.mkdir(parents=True)
        duration[recipe], ended = run(recipe, reference)
        assert ended, (reference / "output.log").read_text(encoding="utf-8")
        expected[recipe] = outcome(recipe, reference)
        if arguments.within == "fit":
            lock, end = (reference / run_of(recipe) / name for name in (".lock", "run.json"))
            duration[recipe] = end.stat().st_mtime - lock.stat().st_mtime
        print(f"{recipe}: {duration[recipe]:.0f} s, {len(expected[recipe])} things to compare", flush=True)
    rng = random.Random(arguments.seed)
    counts: dict[tuple[str, str], list[int]] = {}
    number = 0
    while number < arguments.kills:
        recipe = list(RECIPES)[number % len(RECIPES)]
        folder = root / f"try_{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        once = folder / run_of(recipe) / "run.json" if arguments.within == "fit" else None
        _, ended = run(recipe, folder, rng.uniform(0, duration[recipe]), once)
        stage = where(recipe, folder)
        if ended or (arguments.within == "fit" and not stage.startswith("in the fit")):
            continue  # the run ended before the kill, so it does not count
        number += 1
        _, ended = run(recipe, folder)
        survived = ended and outcome(recipe, folder) == expected[recipe]
        count = counts.setdefault((recipe, stage), [0, 0])
        count[0] += survived
        count[1] += 1
        fate = "survived" if survived else f"LOST, see {folder}"
        print(f"{number}: {recipe} killed {stage}: {fate}", flush=True)
        if survived:
            shutil.rmtree(folder)
    survived, tried = (sum(count[i] for count in counts.values()) for i in (0, 1))
    lines = [f"| {recipe} | {stage} | {count[1]} | {count[0]} |" for (recipe, stage), count in sorted(counts.items())]
    text = "\n".join(
        [
            f"Made on {date.today()} by `python benchmarks/kill.py {' '.join(sys.argv[1:])}`: {survived} of {tried} "
            "kills survived. Tries take turns between the recipes; a moment within the run is drawn for each.",
            "",
            "| recipe | killed | kills | survived |",
            "| --- | --- | ---: | ---: |",
            *lines,
        ]
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(f"# Kill it anywhere\n\n{text}\n", encoding="utf-8")
    sys.exit(survived != tried)


if __name__ == "__main__":
    main()
