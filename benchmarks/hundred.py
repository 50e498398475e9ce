"""What editing a hundred concepts at once costs at the size of Stable Diffusion 1.4: seconds, counts, memory.

    OMP_NUM_THREADS=1 python benchmarks/hundred.py --output docs/results/hundred.md

Builds a pipeline of that architecture with random weights, float32 (``sd14_footprint.build``, once, 4.3 GB on the
disk), then fits all concepts of the set ``hundred`` with the recipes of UCE, SPEED and the null space, and retains the
set's 200 texts. Every fit is a user's command in a process of its own; so are the restatements of the codes of UCE and
SPEED (``references.py``), which get the same texts and weights. Nothing is said about how much is forgotten.

Counted is from ``on_fit_start`` to ``on_fit_end``, the checkpoint included, and loading not: seconds of the processor,
since other programs may run; prompts and positions that the text encoder reads; factorisations. Memory is the highest
resident size of the process in that time, less the size at its start; before that, all weights are read once, since
pages of a file that nothing has read would count as memory of the fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from costs import Cost, counted
from sd14_footprint import build
from stored import add_options, make_stored

from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.system.memory import peak_memory

SET = "hundred"
NAMES = {"prompts": "names", "towards": "empty", "tokens": "last_subject"}
FEW_PICTURES = {"watched_prompts": 1, "num_inference_steps": 1}
"""Of the null space in K and V: its measured drift needs predictions of the denoiser, a minute each."""


@dataclass(frozen=True)
class Case:
    """What is measured in a process of its own.

    Attributes:
        key: Its name.
        title: The same in the table.
        recipe: Recipe of a fit; "" for the restatement of another code.
        model: Settings of the method, besides those of every fit.
        edit: Settings of the solver.
        kept: Setting that takes the texts to retain; "" if the method takes them from the set itself.
        beside: The case whose seconds the table divides by, and what may be had of them at most; "" for none.
    """

    key: str
    title: str
    recipe: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)
    kept: str = ""
    beside: tuple[str, float] = ("", 0.0)


CASES = (
    Case("reference_uce", "UCE 28c81ed, restated"),
    Case("uce_names", "UCE, names", "uce_2025.yaml", kept="preserve", beside=("reference_uce", 0.1)),
    Case("reference_speed", "SPEED 6d3df0c, restated"),
    Case(
        "speed_names", "SPEED, names", "speed_paper.yaml", kept="retain", beside=("reference_speed", 0.3),
        edit={"threshold": 1e-4, "retain_scale": 0.05, "filter": False},
    ),
    Case("uce_prompts", "UCE, edit prompts", "uce.yaml"),
    Case(
        "null_space_direct", "null space direct, last layer, edit prompts", "null_space_direct.yaml",
        model={"first_layer": -1}, beside=("uce_prompts", 2.0),
    ),
    Case(
        "null_space_unet", "null space in K and V, direct, edit prompts", "null_space_unet.yaml",
        model={"values": "target", **FEW_PICTURES}, beside=("uce_prompts", 2.0),
    ),
)  # fmt: skip


@contextmanager
def measured(pipeline: Pipeline, output: Path, weights: Sequence[torch.nn.Parameter]) -> Iterator[Cost]:
    """Within the block, count; at its end write what the fit has cost to ``output``."""
    for weight in weights:
        weight.detach().sum()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = peak_memory()
    with counted(pipeline.texts[0].model, pipeline.denoiser) as cost:
        yield cost
    found = {name: getattr(cost, name) for name in ("seconds", "encodes", "positions", "factorised", "forwards")}
    found["memory_gb"] = (peak_memory() - before) / 1e9
    output.write_text(json.dumps(found), encoding="utf-8")


class FitCosts(L.Callback):
    """Measures a fit; list it first.

    Args:
        output: The file that the costs are written to.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, before the method's own hook."""
        pipeline = pl_module.pipeline
        assert isinstance(pipeline, Pipeline)
        self.block = measured(pipeline, self.output, list(pipeline.named_parameters().values()))
        self.block.__enter__()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the costs, when the checkpoint is written."""
        self.block.__exit__(None, None, None)


def overlay(case: Case, model: Path, folder: Path, output: Path) -> dict[str, Any]:
    """What a fit of ``case`` sets beyond its recipe."""
    from lit_unlearn.data.concepts import load_concept_set

    concepts = load_concept_set(SET)
    own = {"model": str(model), "concept_set": SET, "judge": "clip", **case.model}
    if case.kept:
        own[case.kept] = list(concepts.retain)
    callback = {"class_path": f"{Path(__file__).stem}.{FitCosts.__name__}", "init_args": {"output": str(output)}}
    trainer = {
        "callbacks": [callback], "default_root_dir": str(folder), "accelerator": "cpu",
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    edit = {"edit": {"init_args": dict(case.edit)}} if case.edit else {}
    return {"concept": list(concepts.concepts), "trainer": trainer, "model": {"init_args": own}, **edit}


def run_fit(case: Case, model: Path, folder: Path, output: Path) -> None:
    """The command ``lit-unlearn fit``, in this process."""
    import yaml

    from lit_unlearn import cli

    path = folder / f"{case.key}_overlay.yaml"
    path.write_text(yaml.safe_dump(overlay(case, model, folder, output)), encoding="utf-8")
    if cli.main(["fit", "--config", case.recipe, "--config", str(path), "--fresh"]):
        raise RuntimeError(f"The fit of {case.key} failed.")


def run_reference(case: Case, model: Path, output: Path) -> None:
    """The restatement of another code, with the names, the retained texts and the weights of our fit."""
    import references

    from lit_unlearn.data.concepts import load_concept_set
    from lit_unlearn.diffusion.load import load_pipeline

    concepts = load_concept_set(SET)
    edited = [name for concept in concepts.concepts.values() for name in concept.names]
    restated: Callable[..., object] = references.uce_2025 if case.key == "reference_uce" else references.speed
    ends = ("attn2.to_k.weight", "attn2.to_v.weight") if case.key == "reference_uce" else ("attn2.to_v.weight",)
    pipeline = load_pipeline(str(model))
    named = pipeline.named_parameters()
    weights = [value.detach() for name, value in named.items() if name.endswith(ends)]
    with torch.no_grad(), measured(pipeline, output, list(named.values())):
        restated(pipeline, weights, edited, list(concepts.retain))


def make(case: Case, root: Path) -> dict[str, Any]:
    """Measure ``case`` in a process of its own; the model is built if it is not there.

    Raises:
        RuntimeError: It failed; the log says why.
    """
    if not (root / "sd14" / "model_index.json").exists():
        build(root / "sd14", "float32")
    output, log = root / f"{case.key}.json", root / f"{case.key}.log"
    command = [sys.executable, __file__, "--root", str(root), "--only", case.key, "--here"]
    with log.open("w", encoding="utf-8") as file:
        if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
            raise RuntimeError(f"{case.key} failed: see {log}.")
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def table(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The results in Markdown."""
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    lines = [
        f"{threads} thread(s), {platform.machine()}, no GPU, a machine that other programs use too: seconds are those",
        "of the processor. Memory is what a fit needs at most beyond the loaded model.",
        "",
        "| 100 edited, 200 retained | seconds | **of** | goal | prompts | positions | factorised | memory, GB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    titles = {case.key: case.title for case in CASES}
    for case in CASES:
        if (own := known.get(case.key)) is None:
            continue
        other, most = case.beside
        beside = known.get(other)
        share = f"{own['seconds'] / beside['seconds']:.2f} of {titles[other]}" if beside else ""
        counts = [f"{own[name]:,}" for name in ("encodes", "positions", "factorised")]
        goal = f"{most:g}" if other else ""
        cells = [case.title, f"{own['seconds']:.1f}", share, goal, *counts, f"{own['memory_gb']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "logs/bench/hundred", "docs/results/hundred.json")
    known = [case.key for case in CASES]
    parser.add_argument("--only", nargs="+", default=known, choices=known)
    parser.add_argument("--here", action="store_true", help="measure in this process, for the benchmark itself")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.key in arguments.only]
    if not arguments.here:
        make_stored(arguments, cases, make, table, "A hundred concepts at the size of Stable Diffusion 1.4")
        return
    root = Path(arguments.root)
    for case in cases:
        output, model = root / f"{case.key}.json", root / "sd14"
        if case.recipe:
            run_fit(case, model, root, output)
        else:
            run_reference(case, model, output)


if __name__ == "__main__":
    main()
