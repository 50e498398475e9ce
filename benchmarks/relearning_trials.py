r"""What resists relearning: single edits, two edits together, and noise where no retained prompt looks.

    python benchmarks/relearning_trials.py --output docs/results/relearning.md

Three edits of a concept are attacked by fine-tuning on 10 pictures of it, 32 steps: the attacker trains the edited
weights, or all weights of the denoiser. Two trials follow: the edits of the text encoder and of the cross-attention in
one model (``null_space + null_space_robust``), and noise in those directions of keys and values that no retained prompt
uses (orthogonal complement noise), so that relearning starts far from the pretrained weights. A result is stored below
``--root`` as soon as it is there. It takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from leaders import NUM_PICTURES, edited
from leaders_tables import share, table
from torch import Tensor

CONCEPTS = ("owl", "castle", "cartoon", "dancing")
VARIANTS = {
    "uce": ("uce",),
    "null_space": ("null_space",),
    "null_space_robust": ("null_space_robust",),
    "null_space + null_space_robust": ("null_space", "null_space_robust"),
    "null_space_robust + noise": ("null_space_robust",),
}
PARTS = {"the edited weights": "edited", "all of the UNet": "all"}
NOISE, THRESHOLD = 1.0, 0.03
"""Norm of the noise in units of the weight's, and the soft null space in which it lies, as in the recipe."""


def noise_of(pipeline: Any, weights: Mapping[str, Tensor], prompts: list[str]) -> dict[str, Tensor]:
    """Random changes of keys and values that move no output of ``prompts`` or of the empty prompt."""
    from lit_unlearn.core.closed_form import second_moment

    moment = second_moment(pipeline.encode_many([*prompts, ""]).states.flatten(0, 1)).double()
    level = THRESHOLD * moment.trace() / len(moment)
    free = torch.linalg.inv(moment / level + torch.eye(len(moment), dtype=torch.float64))
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in weights.items():
        change = torch.randn(weight.shape, generator=generator).double() @ free
        found[name] = (NOISE * change * weight.norm() / change.norm()).to(weight.dtype)
    return found


def attacked(variant: str, parts: str, concept: str, root: Path) -> dict[str, Any]:
    """Share of pictures with the concept after relearning, the steps it took, and the share before it."""
    from lit_unlearn.attacks.base import AttackedModel
    from lit_unlearn.attacks.relearning import Relearning
    from lit_unlearn.data.concepts import load_concept_set
    from lit_unlearn.diffusion.load import load_pipeline
    from lit_unlearn.diffusion.parameters import PretrainedValues
    from lit_unlearn.edits.checkpoint import read_edit
    from lit_unlearn.judges.load import load_judge

    concepts = load_concept_set("emoji20")
    edits = [read_edit(edited(method, [concept], root)) for method in VARIANTS[variant]]
    pipeline = load_pipeline("emoji-sd")
    parameters = pipeline.named_parameters()
    weights = {name: value for edit in edits for name, value in edit.weights.items()}
    pretrained = PretrainedValues({name: parameters[name] for name in weights})
    item = concepts.get(concept)
    with torch.no_grad():
        if "noise" in variant:
            changes = noise_of(pipeline, weights, concepts.retain_prompts([concept]))
            weights = {name: value + changes[name] for name, value in weights.items()}
        for name, value in weights.items():
            parameters[name].copy_(value)
    settings = edits[0].hyper_parameters
    judge = load_judge("emoji", {}, concepts)
    model = AttackedModel(
        pipeline, pretrained, item, judge, settings["num_inference_steps"], settings["guidance_scale"], NUM_PICTURES
    )
    before = model.verdicts(model.draw(model.prompts, model.seeds))
    found = Relearning(parts=parts).search(model)  # type: ignore[arg-type]
    return {"before": sum(before), "curve": found.report["curve"], "steps": found.report["steps_needed"]}


def main() -> None:
    """Make what is missing, and write the table."""
    from lit_unlearn.system.json_files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/relearning")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(arguments.root).absolute()
    stored = root / "relearning.json"
    known = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    rows = []
    for variant in VARIANTS:
        row = [variant]
        for label, parts in PARTS.items():
            found = []
            for concept in arguments.concepts:
                key = f"{variant}/{label}/{concept}"
                if key not in known:
                    known[key] = attacked(variant, parts, concept, root)
                    root.mkdir(parents=True, exist_ok=True)
                    write_json(stored, known)
                    print(key, known[key], flush=True)
                found.append(known[key])
            pictures = NUM_PICTURES * len(found)
            back = sum(round(result["curve"][-1][1] * NUM_PICTURES) for result in found)
            steps = [result["steps"] or 64 for result in found]
            row += [share(back / pictures, pictures), "> 32" if median(steps) > 32 else f"{median(steps):g}"]
        before = sum(result["before"] for result in found)
        rows.append([row[0], share(before / pictures, pictures), *row[1:]])
    header = ["", "before"]
    header += [text for label in PARTS for text in (f"trains {label}", "steps until half of the pictures show it")]
    text = (
        "# What resists relearning\n\n"
        f"By `python benchmarks/relearning_trials.py`: {', '.join(arguments.concepts)}, {NUM_PICTURES} pictures each,\n"
        "after 32 steps of Adam (1e-3) on 10 pictures of the concept; steps are the median over the concepts.\n\n"
        f"{table(header, rows)}\n"
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
