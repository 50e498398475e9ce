"""Kills a fit, its test and its export at random moments, starts them again, and compares with a run left alone.

    python benchmarks/kill.py --kills 30 --output docs/results/kill.md

Every try: the three commands are started in a new folder, killed (SIGKILL, the whole process group) after a random
delay within the time that they take, and started again, the same commands. A kill is survived if the weights are equal
to the last bit, the scores equal but for the clock, and the exported files equal.
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
from pathlib import Path

RUN = Path("logs", "null_space", "dog", "version_0")
SHORT = ["--model.init_args.rounds", "1", "--model.init_args.last_layer", "2", "--model.init_args.num_inference_steps"]
SHORT += ["2", "--data.init_args.steps", "2", "--data.init_args.batch_size", "4", "--data.init_args.images_per_prompt"]
SHORT += ["1", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def script() -> str:
    """The three commands, as a person would put them into a script that may be started again."""
    program = f"{sys.executable} -m lit_unlearn"
    recipe = " ".join(["--config", "null_space.yaml", "--concept", "dog", *SHORT])
    ckpt_path = RUN / "checkpoints" / "last.ckpt"
    return "\n".join(
        [
            "set -e",
            f"{program} fit {recipe} --once",
            f"{program} test {recipe} --overwrite",
            f"{program} export --ckpt_path {ckpt_path} --output export --overwrite",
        ]
    )


def run(folder: Path, kill_after: float | None = None) -> tuple[float, bool]:
    """Run the script in ``folder``; return how long it took and whether it came to its end."""
    started = time.perf_counter()
    with (folder / "output.log").open("a") as log:
        process = subprocess.Popen(
            ["bash", "-c", script()],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return time.perf_counter() - started, process.returncode == 0


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of what must be equal: edited weights, scores without the clock, exported files."""
    from lit_unlearn.checkpoint import read_edit
    from lit_unlearn.diffusion.parameters import fingerprint

    scores = json.loads((folder / RUN / "scores.json").read_text())
    scores.pop("cost")
    found = {
        "weights": fingerprint(read_edit(folder / RUN / "checkpoints" / "last.ckpt").weights),
        "scores": hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest(),
    }
    for path in sorted((folder / "export").rglob("*")):
        if path.is_file() and path.name not in ("provenance.json", "README.md"):  # these name the clock
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def where(folder: Path) -> str:
    """How far a killed run had come."""
    if (folder / "export").exists():
        return "after the export"
    if (folder / RUN / "scores.json").exists():
        return "in the export"
    state = json.loads((folder / RUN / "run.json").read_text())["state"] if (folder / RUN / "run.json").exists() else ""
    if state == "finished":
        return "in the test"
    if (folder / RUN / "checkpoints" / "last.ckpt").exists():
        return "in the fit, after a checkpoint"
    return "in the fit, before a checkpoint" if state else "before the fit"


def main() -> None:
    """Kill, start again, compare; write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--root", default="logs/bench/kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    root = Path(arguments.root).absolute()
    shutil.rmtree(root, ignore_errors=True)
    reference = root / "reference"
    reference.mkdir(parents=True)
    # The first run also draws the unedited pictures; a second one says how long the commands take with them at hand.
    _, ended = run(reference)
    assert ended, (reference / "output.log").read_text()
    expected = outcome(reference)
    print(f"reference: {len(expected)} things to compare", flush=True)
    rng = random.Random(arguments.seed)
    duration = 0.0
    counts: dict[str, list[int]] = {}
    number = 0
    while number < arguments.kills:
        folder = root / f"try_{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if not duration:
            duration, ended = run(folder)
            assert ended
            continue
        _, ended = run(folder, rng.uniform(0, duration))
        if ended:
            continue  # it was faster than the kill: no try
        number += 1
        stage = where(folder)
        _, ended = run(folder)
        survived = ended and outcome(folder) == expected
        count = counts.setdefault(stage, [0, 0])
        count[0] += survived
        count[1] += 1
        print(f"{number}: killed {stage}: {'survived' if survived else 'LOST, see ' + str(folder)}", flush=True)
        if survived:
            shutil.rmtree(folder)
    survived, tried = (sum(count[i] for count in counts.values()) for i in (0, 1))
    lines = [f"| {stage} | {count[1]} | {count[0]} |" for stage, count in sorted(counts.items())]
    text = "\n".join(
        [
            f"Made by `python benchmarks/kill.py {' '.join(sys.argv[1:])}`: {survived} of {tried} kills survived.",
            "",
            "| killed | kills | survived |",
            "| --- | ---: | ---: |",
            *lines,
        ]
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(f"# Kill it anywhere\n\n{text}\n")
    sys.exit(survived != tried)


if __name__ == "__main__":
    main()
