"""Debiases several subjects at once, with equal and with unequal shares, and measures the result on new pictures.

    python benchmarks/uce_debias.py --output docs/results/uce_debias.md

``uce_debias.yaml`` balances the style of subjects in prompts without a style. The run stops at the first round that is
near enough, so that round's own shares are too optimistic. Therefore the tables show the shares in other pictures,
``--pictures`` of each phrase, before and after the edit. ``retain`` is from ``lit-unlearn test``, over the concepts
that are not edited.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from quiet import QUIET, output_to

from lit_unlearn.core.debiasing import attribute_ratios
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.judges.base import judge_questions
from lit_unlearn.judges.load import load_judge
from lit_unlearn.training.cli import run
from lit_unlearn.training.recipes import find_recipe

SUBJECTS = ("dog", "owl", "castle")
ATTRIBUTES = ("cartoon", "glossy", "sketch", "pixel art")
WISHED = {"equal": [0.25, 0.25, 0.25, 0.25], "unequal": [0.1, 0.2, 0.3, 0.4]}
FIRST_SEED = 50_000_000
"""First seed of the new pictures, larger than the seeds of all rounds of the recipe."""


def fit_and_test(name: str, root: Path) -> Path:
    """Run the recipe unless it was run before; return the run's folder."""
    top = root / name
    folder = top / "uce_debias" / "+".join(SUBJECTS) / "version_0"
    common = ["--config", str(find_recipe("uce_debias.yaml")), "--concept", json.dumps(list(SUBJECTS)), *QUIET]
    common += ["--model.init_args.ratios", json.dumps(WISHED[name]), "--trainer.default_root_dir", str(top)]
    if not (folder / "scores.json").exists():
        with output_to(top / "output.log"):
            run(["fit", *common, "--once"])
            run(["test", *common, "--data.init_args.images_per_prompt", "1"])
    return folder


@torch.no_grad()
def shares(folder: Path, pictures: int) -> dict[str, dict[str, list[float]]]:
    """Map each subject to the shares of the attributes and of itself in new pictures, before and after the edit."""
    concepts = load_concept_set("emoji20")
    judge = load_judge("emoji", {}, concepts)
    edit = read_edit(folder / "checkpoints" / "last.ckpt")
    components, pretrained = load_with_pretrained(BaseModel.find(edit.model), edit)
    steps, guidance = (edit.hyper_parameters[key] for key in ("num_inference_steps", "guidance_scale"))

    def measured(subject: str, seed: int) -> list[float]:
        questions = [concepts.get(name).question for name in (*ATTRIBUTES, subject)]
        answers = []
        for start in range(0, pictures, 40):
            seeds = list(range(seed + start, seed + min(start + 40, pictures)))
            drawn = components.draw([subject] * len(seeds), seeds, steps, guidance)
            asked = [judge_questions(judge, drawn, [question] * len(seeds)) for question in questions]
            answers.append(torch.stack(asked, dim=1))
        found = torch.cat(answers)
        return [*attribute_ratios(found[:, :-1]).tolist(), float((found[:, -1] >= 0.5).double().mean())]

    result = {}
    for place, subject in enumerate(SUBJECTS):
        seed = FIRST_SEED + 10_000 * place
        with pretrained.restored():
            before = measured(subject, seed)
        result[subject] = {"before": before, "after": measured(subject, seed)}
    return result


def main() -> None:
    """Run both settings and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="logs/bench/uce_debias")
    parser.add_argument("--pictures", type=int, default=200, help="number of pictures of each phrase, before and after")
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    made = f"Made on {date.today()} by `python benchmarks/uce_debias.py`, {arguments.pictures} pictures a phrase."
    lines = ["# Debiasing three subjects at once", "", made]
    for name, wished in WISHED.items():
        folder = fit_and_test(name, Path(arguments.root))
        scores = Scores.load(folder / "scores.json")
        rounds = scores.edit["rounds"]
        lines += ["", f"## Wished shares: {name}", ""]
        lines.append("| subject | | " + " | ".join(ATTRIBUTES) + " | largest deviation | subject shown |")
        lines.append("| --- | --- |" + " ---: |" * (len(ATTRIBUTES) + 2))
        lines.append("| | wished | " + " | ".join(f"{share:.2f}" for share in wished) + " | | |")
        for subject, found in shares(folder, arguments.pictures).items():
            for when, (*ratios, shown) in found.items():
                deviation = max(abs(r - w) for r, w in zip(ratios, wished, strict=True))
                cells = [f"{value:.2f}" for value in (*ratios, deviation, shown)]
                lines.append(f"| {subject} | {when} | {' | '.join(cells)} |")
        before = scores.before.retain if scores.before else None
        lines += [
            "",
            f"{len(rounds) - 1} rounds, largest deviation in them "
            + ", ".join(f"{found['largest_deviation']:.2f}" for found in rounds)
            + f". Retain of the other concepts {scores.retain:.3f}, unedited {before:.3f}.",
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
