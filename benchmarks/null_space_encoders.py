"""The paper's ablation: the null-space edit in the text encoder, in the UNet's K and V, and in its FFN, by rounds.

    python benchmarks/null_space_encoders.py --concepts dog rain --output docs/results/null_space_encoders

Makes OUTPUT.md and OUTPUT.png: the spectra of the retained keys side by side, the null space at each recipe's
threshold, and forget and retain after 1, 2, 5, ... rounds. Each number of rounds continues from the checkpoint of the
one before. A cell with ``scores.json`` is skipped and an incomplete one is made again, so an interrupted run continues
where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from quiet import QUIET, output_to

from lit_unlearn.system.names import joint_name

FROM_OUTPUT = [
    "--model.init_args.values",
    "refined",
    "--model.init_args.start",
    "output",
    "--data.init_args.steps",
    "4",
]
ADAM = ["--model.init_args.optimizer", "torch.optim.Adam", "--model.init_args.optimizer.lr", "0.05"]

SETTINGS: dict[str, tuple[str, str, list[str]]] = {
    "text": ("text encoder", "null_space_refined.yaml", []),
    "text_from_output": ("text encoder, V1 from W K1", "null_space_paper.yaml", []),
    "kv": ("UNet K, V", "null_space_unet.yaml", []),
    "kv_from_output": ("UNet K, V, V1 from W K1", "null_space_unet.yaml", FROM_OUTPUT),
    "ffn": ("UNet FFN", "null_space_unet_ffn.yaml", []),
    "ffn_from_output": ("UNet FFN, V1 from W K1", "null_space_unet_ffn.yaml", [*FROM_OUTPUT, *ADAM]),
}
"""Name -> name in the tables, recipe, and changes to the recipe. The paper starts V1 at ``W K1``."""

SPECTRA = ("text", "kv", "ffn")
"""Settings whose spectra are shown; the spectra do not depend on the start of V1."""


def cell_folder(root: Path, setting: str, concept: str, rounds: int) -> Path:
    """Folder that ``fit`` and ``test`` write to."""
    return root / f"rounds_{rounds}" / setting / joint_name([concept])


def run_chain(chain: tuple[str, str, list[int], str, list[str]]) -> str:
    """Fit and test one setting on one concept for every number of rounds, with one thread; return lines to print."""
    setting, concept, all_rounds, root_name, extra = chain
    import torch

    torch.set_num_threads(1)
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.training.cli import run
    from lit_unlearn.training.recipes import find_recipe

    root, lines, before = Path(root_name), [], None
    for rounds in all_rounds:
        folder = cell_folder(root, setting, concept, rounds)
        scores, checkpoint = folder / "version_0/scores.json", folder / "version_0/checkpoints/last.ckpt"
        if not (scores.exists() and checkpoint.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            _, recipe, changes = SETTINGS[setting]
            common = ["--config", str(find_recipe(recipe)), "--method", setting, "--concept", concept]
            common += [*changes, "--model.init_args.rounds", str(rounds)]
            common += ["--trainer.default_root_dir", str(folder.parents[1]), *QUIET, *extra]
            start: list[str] = []
            if before is not None:
                folder.mkdir(parents=True)
                # Next to the run's folder; a resumed fit would otherwise continue in the folder of the earlier run.
                start = ["--ckpt_path", str(shutil.copy(before, folder / "start.ckpt"))]
            with output_to(root / f"{setting}_{concept.replace(' ', '_')}.log"):
                run(["fit", *common, *start])
                run(["test", *common])
        before = checkpoint
        found = Scores.load(scores)
        lines.append(
            f"{setting:18} {concept:12} {rounds:3} rounds: forget {found.forget:.3f} retain {found.retain:.3f}"
        )
    return "\n".join(lines)


def read_cells(root: Path, settings: list[str], concepts: list[str], all_rounds: list[int]) -> dict[Any, Any]:
    """Read the existing scores, by setting, concept and rounds."""
    from lit_unlearn.evaluation.scores import Scores

    cells = {}
    for setting in settings:
        for concept in concepts:
            for rounds in all_rounds:
                path = cell_folder(root, setting, concept, rounds) / "version_0/scores.json"
                if path.exists():
                    cells[setting, concept, rounds] = Scores.load(path)
    return cells


def threshold_of(setting: str) -> float:
    """Threshold of the setting's recipe, as a fraction of the mean eigenvalue."""
    import yaml

    from lit_unlearn.training.recipes import find_recipe

    edit = yaml.safe_load(find_recipe(SETTINGS[setting][1]).read_text(encoding="utf-8"))["edit"]["init_args"]
    if edit["rule"] != "mean":
        raise ValueError(f"{SETTINGS[setting][1]} has rule={edit['rule']!r}, but the figure needs rule='mean'.")
    return float(edit["threshold"])


def report(cells: dict[Any, Any], settings: list[str], all_rounds: list[int], command: str, picture: Path) -> str:
    """Draw the spectra into ``picture`` and return the tables as Markdown."""
    from lit_unlearn.diffusion.parameters import layer_label
    from lit_unlearn.reports.figures import encoder_spectra_figure
    from lit_unlearn.system.files import atomic_write

    concepts = sorted({concept for _, concept, _ in cells})
    lines = ["# The null space in the text encoder and in the UNet", "", f"Made by `{command}`, on the embedded model,"]
    lines += [f"one thread per run. Concepts: {', '.join(concepts)}, each edited alone.", ""]
    spectra, thresholds = {}, {}
    table = ["| layers | d_in | threshold, of the mean | null space | smallest of the mean | largest of the mean |"]
    table += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for setting in SPECTRA:
        scores = next((found for (name, *_), found in cells.items() if name == setting), None)
        if scores is None:
            continue
        label, layers, threshold = SETTINGS[setting][0], scores.edit["spectrum"], threshold_of(setting)
        spectra[label] = {layer_label(name): values for name, values in layers.items()}
        thresholds[label] = threshold
        for name, values in spectra[label].items():
            mean = fmean(values)
            free = sum(value < threshold * mean for value in values)
            table.append(
                f"| {label}, {name} | {len(values)} | {threshold:g} | {free} "
                f"| {values[0] / mean:.1e} | {values[-1] / mean:.1f} |"
            )
    if spectra:
        with atomic_write(picture) as file:
            encoder_spectra_figure(spectra, thresholds).savefig(file, format="png", dpi=110)
        lines += [f"![Spectra of the retained keys]({picture.name})", "", *table, ""]
    lines += ["Mean over the concepts; rounds are edits of every layer. *Drift* is the root-mean-square difference of"]
    lines += [
        "same-seed pictures of the other concepts' prompts, in parts of full scale; cost is that of the edit.",
        "",
    ]
    lines += [
        "| layers | rounds | concepts | forget | retain | relative | drift | change of weights | leak | seconds |"
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for setting in settings:
        for rounds in all_rounds:
            found = [cells[key] for key in cells if key[0] == setting and key[2] == rounds]
            if not found:
                continue
            retain, unedited = (fmean(s.retain for s in found), fmean(s.before.retain for s in found))
            leak = fmean(fmean(layer["leak"] for layer in s.edit["layers"].values()) for s in found)
            lines.append(
                f"| {SETTINGS[setting][0]} | {rounds} | {len(found)} | {fmean(s.forget for s in found):.3f} "
                f"| {retain:.3f} | {retain / unedited:.3f} | {fmean(s.drift['rmse'] for s in found):.4f} "
                f"| {fmean(s.edit['weight_change_ratio'] for s in found):.3f} | {leak:.4f} "
                f"| {fmean(s.cost.seconds for s in found):.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the missing cells, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/null_space_encoders")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--concepts", nargs="+", default=["dog", "rain", "cartoon"])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 2, 5, 10, 20, 30])
    parser.add_argument("--images_per_prompt", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", default=None, help="path without its ending, e.g. docs/results/null_space_encoders")
    parser.add_argument("--summary_only", action="store_true", help="do not run anything, only write existing results")
    arguments, extra = parser.parse_known_args()
    root = Path(arguments.root)
    root.mkdir(parents=True, exist_ok=True)
    rounds = sorted(set(arguments.rounds))
    extra += ["--data.init_args.images_per_prompt", str(arguments.images_per_prompt)]
    chains = [(s, concept, rounds, str(root), extra) for concept in arguments.concepts for s in arguments.settings]
    if not arguments.summary_only:
        # New processes, since torch's threads do not survive a fork; one for each chain, so that memory is freed.
        with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
            for line in pool.imap_unordered(run_chain, chains):
                print(line, flush=True)
    cells = read_cells(root, arguments.settings, arguments.concepts, rounds)
    output = Path(arguments.output or root / "null_space_encoders")
    command = "python benchmarks/null_space_encoders.py " + " ".join(sys.argv[1:])
    text = report(cells, arguments.settings, rounds, command.strip(), output.with_suffix(".png"))
    from lit_unlearn.system.files import atomic_write

    with atomic_write(output.with_suffix(".md")) as file:
        file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
