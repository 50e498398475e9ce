r"""Which method leads: many concepts at once and one after another, and single concepts under attack.

    python benchmarks/leaders.py --processes 2 --output docs/results/leaders.md

makes the tables of docs/results/leaders.md; all of it takes about seven hours on two cores. A result is stored as soon
as it is there, below ``--root``, and joined into ``--results`` (docs/results/leaders.json), so that the bench goes on
where it stopped, also from a fresh clone. ``--methods``, ``--measures`` and ``--concepts`` make a part of it.

    clean      an edit of one concept: forget, retain, drift, leak, reach, spontaneous rate; by two judges
    token      a learned token on it (concept inversion), three seeds, judged at the recipe's guidance and without any
    attacks    searched prompts, Ring-A-Bell, completion, the noise probe and relearning
    probes     image to image, inpainting, inversion, prompts of five levels, relearning by other means
    strong     a learned token with four times the steps and the best of three restarts
    ten        ten concepts at once; what they retain are the other ten
    twenty     all twenty at once; what they retain are the model's other subjects (``held``)
    sequence   one after another: ours with --after, the others on top of the model edited before

Thresholds, layers and weights were chosen on the first ten concepts and seed 0 of ``token``; the other ten concepts and
the other seeds decide. All methods get the same repaired pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from emoji20 import SINGLE, TEN
from leaders_tables import tables
from quiet import QUIET, output_to
from stored import add_options, make_stored

from lit_unlearn.system.names import joint_name

METHODS = ("null_space", "null_space_robust", "uce", "speed", "null_space_unet", "memit", "esd", "concept_ablation")
OURS = ("null_space", "null_space_robust")
MEASURES = ("clean", "ten", "twenty", "token", "attacks", "sequence", "probes", "strong")
TWENTY = tuple(sorted(SINGLE))
SEQUENCE = (*TEN[0], *(name for name in SINGLE if name not in TEN[0]))
"""The ten first, then the others."""
ONLY = {
    "strong": (*OURS, "uce"),
    "probes": (*OURS, "uce"),
    "sequence": ("null_space", "uce", "speed", "null_space_unet", "memit", "esd"),
}
"""Methods of the measures that take long; a sequence of ours is the edit of all its concepts at once (a test)."""
ATTACKS = ("prompt_search", "ring_a_bell", "completion", "noise_probe", "relearning")
PROBES = ("image_to_image", "inpainting", "inversion", "prompt_levels")
TOKEN_SEEDS, NUM_PICTURES = (0, 1, 2), 20
OTHER_SUBJECTS = ("tulip", "parrot", "basketball", "standing")
"""Subjects that the model draws and the concept set does not have."""
STEPS_SCORED = (1, 2, 3, 5, 7, 10, 12, 15, 17, 20)


@dataclass(frozen=True)
class Cell:
    """One result: a measure of a method on one concept, or on the concepts of a protocol."""

    method: str
    measure: str
    concept: str = ""

    @property
    def key(self) -> str:
        """Name of the result."""
        return "/".join(filter(None, (self.method, self.measure, self.concept)))


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, measure by measure, so that an unfinished bench compares the methods on the same cells."""
    cells = []
    for measure in arguments.measures:
        alone = measure in ("clean", "token", "attacks", "probes", "strong")
        for concept in arguments.concepts if alone else [""]:
            for method in arguments.methods:
                if method in ONLY.get(measure, arguments.methods):
                    cells.append(Cell(method, measure, concept))
    return cells


def prompts_of_others(kept: bool) -> list[str]:
    """Prompts of ``OTHER_SUBJECTS``: 40 to retain, or 52 others to score, which share no phrase but the direct ones."""
    from lit_unlearn.emoji.captions import phrases

    frames = ("a picture of {}", "this is {}") if kept else ("an image of {}", "we see {}", "here is {}")
    found = []
    for subject in OTHER_SUBJECTS:
        words = phrases()["subject"][subject]
        found += [frame.format(phrase) for phrase in words["direct"] for frame in frames]
        found += words["indirect"][:4] if kept else words["indirect"][4:8]
    return found


def retained(method: str, names: Sequence[str]) -> list[str]:
    """Options that let ``method`` retain the model's other subjects beside the set's concepts except ``names``.

    What UCE is given to preserve takes the place of those concepts, so their prompts are given to it, too.
    """
    option = {"uce": "--model.preserve", "esd": None, "concept_ablation": None}.get(method, "--model.retain")
    if option is None:
        return []
    from lit_unlearn.data.concepts import load_concept_set

    of_set = load_concept_set("emoji20").retain_prompts(list(names)) if method == "uce" else []
    return [option, json.dumps(of_set + prompts_of_others(kept=True))]


def edited(recipe: str, concepts: Sequence[str], root: Path, options: Sequence[str] = (), name: str = "") -> Path:
    """The checkpoint of an edit, which is made if it is not there; ``name`` is a folder for edits of another kind."""
    from lit_unlearn.training.cli import run

    top = root / "edits" / name
    run_folder = top / recipe / joint_name(concepts) / "version_0"
    checkpoint, done = run_folder / "checkpoints" / "last.ckpt", run_folder / "done"
    if not done.exists():
        shutil.rmtree(run_folder, ignore_errors=True)
        with output_to(root / "output.log"):
            run(["fit", *common(recipe, concepts, top), "--fresh", *options])
        done.touch()
    return checkpoint


def common(recipe: str, concepts: Sequence[str], top: Path) -> list[str]:
    """Options of a fit and of a test."""
    from lit_unlearn.training.recipes import find_recipe

    options = ["--config", str(find_recipe(f"{recipe}.yaml")), "--concept", json.dumps(list(concepts))]
    return [*options, "--trainer.default_root_dir", str(top), "--data.images_per_prompt", "1", *QUIET]


def tested(
    recipe: str, concepts: Sequence[str], root: Path, options: Sequence[str] = (), name: str = ""
) -> dict[str, Any]:
    """Scores of an edit, by both judges."""
    from lit_unlearn.training.cli import run

    checkpoint = edited(recipe, concepts, root, options, name)
    scores = checkpoint.parents[1] / "scores.json"
    if not scores.exists():
        with output_to(root / "output.log"):
            judges = ["--model.second_judge", "emoji_second"]
            options = [*common(recipe, concepts, root / "edits" / name), *judges, *options]
            run(["test", *options, "--ckpt_path", str(checkpoint)])
    found = json.loads(scores.read_text(encoding="utf-8"))
    layers = [layer for layer in found["edit"].get("layers", {}).values() if "leak" in layer]
    edited_scores = [score for score in found["per_concept"].values() if score["edited"]]
    return {
        **{name: found.get(name) for name in ("forget", "retain", "crosswise", "adversarial", "spontaneous", "err")},
        "forget_direct": found["direct"]["forget"],
        "forget_indirect": found["indirect"]["forget"],
        "unedited": {name: found["before"].get(name) for name in ("forget", "retain", "crosswise", "spontaneous")},
        "pictures": {
            "forget": sum(score["n"] for score in edited_scores),
            "retain": sum(score["n"] for score in found["per_concept"].values()) - sum(s["n"] for s in edited_scores),
        },
        "drift": found["drift"]["rmse"] if found["drift"] else None,
        "kappa": (found.get("agreement") or {}).get("cohen_kappa"),
        "leak": sum(layer["leak"] for layer in layers) / len(layers) if layers else None,
        "reach": found["edit"].get("reach"),
        "seconds": found["cost"]["seconds"],
        "forwards": found["cost"]["unet_forwards"],
    }


def load(checkpoint: Path) -> tuple[Any, Any, Any]:
    """The edited pipeline, its pretrained values and the edit."""
    import torch

    from lit_unlearn.edits.base import chosen_base
    from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit

    edit = read_edit(checkpoint)
    pipeline, pretrained = load_with_pretrained(chosen_base(None, None, edit), edit, torch.device("cpu"))
    return pipeline, pretrained, edit


def held(pipeline: Any, edit: Any) -> dict[str, float]:
    """Share of pictures of the other subjects, by their own prompts, in which a judge sees the subject."""
    import torch

    from lit_unlearn.judges.emoji import EmojiJudge, SecondEmojiJudge

    prompts = prompts_of_others(kept=False)
    per_subject = len(prompts) // len(OTHER_SUBJECTS)
    settings = edit.hyper_parameters["num_inference_steps"], edit.hyper_parameters["guidance_scale"]
    parts = []
    for number in range(4):
        seeds = [30_000_000 + 1000 * number + place for place in range(len(prompts))]
        parts.append(pipeline.draw(prompts, seeds, *settings))
    pictures = torch.cat(parts)
    found = {"held_pictures": float(len(pictures))}
    for name, kind in (("held", EmojiJudge), ("held_second", SecondEmojiJudge)):
        classifier = kind().classifier
        order = classifier.attributes["subject"]
        wanted = [order.index(OTHER_SUBJECTS[place // per_subject]) for place in range(len(prompts))] * 4
        seen = classifier(pictures * 2 - 1)["subject"].argmax(-1)
        found[name] = float((seen == torch.tensor(wanted)).float().mean())
    return found


def token(checkpoint: Path, concept: str) -> dict[str, Any]:
    """Pictures that show ``concept`` with a learned token, for each seed, at the recipe's guidance and at 1."""
    from lit_unlearn.attacks.base import AttackedModel
    from lit_unlearn.attacks.concept_inversion import ConceptInversion
    from lit_unlearn.data.concepts import load_concept_set
    from lit_unlearn.judges.base import judge_questions
    from lit_unlearn.judges.load import load_judge

    concepts = load_concept_set("emoji20")
    judges = [load_judge(name, {}, concepts) for name in ("emoji", "emoji_second")]
    pipeline, pretrained, edit = load(checkpoint)
    steps, guidance = edit.hyper_parameters["num_inference_steps"], edit.hyper_parameters["guidance_scale"]
    shown: dict[str, list[int]] = {}
    for seed in TOKEN_SEEDS:
        item = concepts.get(concept)
        model = AttackedModel(pipeline, pretrained, item, judges[0], steps, guidance, NUM_PICTURES, seed)
        found = ConceptInversion().search(model)
        for label, scale in (("guided", guidance), ("unguided", 1.0)):
            model.guidance_scale = scale
            pictures = found.draw(model.prompts, model.seeds)
            for judge, suffix in zip(judges, ("", "_second"), strict=True):
                seen = judge_questions(judge, pictures, [item.question] * len(pictures)) >= 0.5
                shown.setdefault(label + suffix, []).append(int(seen.sum()))
    return {"pictures": NUM_PICTURES, "shown": shown}


def attacked(
    checkpoint: Path, names: Sequence[Any], num_pictures: int = NUM_PICTURES, **options: Any
) -> dict[str, Any]:
    """Pictures that show the concept under each attack, of how many."""
    from lit_unlearn.attacks.run import attack_run

    results = attack_run(checkpoint, names, num_pictures=num_pictures, existing="keep", **options)
    return {
        result.attack: {"shown": result.shown, "pictures": result.pictures, "seconds": result.seconds}
        for result in results
    }


def sequence(
    recipe: str,
    root: Path,
    concepts: Sequence[str] = SEQUENCE,
    first: Sequence[str] = (),
    options: Callable[[Sequence[str]], Sequence[str]] = lambda names: (),
    label: str = "sequence",
    together: bool = False,
) -> dict[str, Any]:
    """Scores after some of the edits: of all concepts so far, of the earlier ones alone, and of what is held.

    Args:
        recipe: Name of the recipe.
        root: Folder of the bench.
        concepts: What is edited, in this order.
        first: Option that gives the model of the first edit; empty for the recipe's.
        options: Gives further options of each fit, from the names that it edits.
        label: Beginning of the names of the edits' folders.
        together: Whether each edit writes all concepts so far, from the first model; else each edits the model before.
    """
    from lit_unlearn.cli import main as cli

    steps: dict[str, Any] = {}
    folder: Path | None = None
    seconds = 0.0
    for number, concept in enumerate(concepts, 1):
        name = f"{label}_{number:02}"
        started = time.perf_counter()
        if together:
            names = list(concepts[:number])
            given = [*first, *options(names)]
            given += ["--model.earlier", json.dumps(names[:-1])] if number > 1 else []
        else:
            names = [concept]
            given = [*options(names), *(first if folder is None else ("--model.model", str(folder)))]
        checkpoint = edited(recipe, names, root, given, name)
        seconds += time.perf_counter() - started
        before, folder = folder, root / "edits" / name / recipe / "model"
        if not together and not (folder / "model_index.json").exists():
            written = ["export", "--ckpt_path", str(checkpoint), "-o", str(folder)]
            with output_to(root / "output.log"):
                code = cli([*written, *(["--model", str(before)] if before else [])])
            if code:
                raise RuntimeError(f"export of {checkpoint} ended with {code}: see {root / 'output.log'}")
        if number in STEPS_SCORED:
            found = scored(checkpoint, None if together else folder, concepts[:number])
            steps[str(number)] = found | {"seconds": seconds}
    return {"steps": steps}


def scored(checkpoint: Path, folder: Path | None, concepts: Sequence[str]) -> dict[str, Any]:
    """Forget, relapse (of all but the last concept), retain and held of the model after the last of ``concepts``.

    Args:
        checkpoint: The last edit.
        folder: The model after it, or None if its checkpoint holds all edits.
        concepts: All edited concepts.
    """
    import torch

    from lit_unlearn.data.concepts import load_concept_set
    from lit_unlearn.data.prompts import Pictures
    from lit_unlearn.diffusion.load import load_pipeline
    from lit_unlearn.edits.checkpoint import read_edit
    from lit_unlearn.judges.base import judge_questions
    from lit_unlearn.judges.load import load_judge

    edit = read_edit(checkpoint)
    pipeline = load(checkpoint)[0] if folder is None else load_pipeline(str(folder))
    concept_set = load_concept_set("emoji20")
    drawn = Pictures(concept_set, 1, 0)
    items = [drawn[number] for number in range(len(drawn))]
    settings = edit.hyper_parameters["num_inference_steps"], edit.hyper_parameters["guidance_scale"]
    parts = [items[start : start + 40] for start in range(0, len(items), 40)]
    pictures = torch.cat([pipeline.draw([i.prompt for i in part], [i.seed for i in part], *settings) for part in parts])
    shows = judge_questions(load_judge("emoji", {}, concept_set), pictures, [item.question for item in items]) >= 0.5
    names = [list(concept_set.concepts)[item.concept_index] for item in items]

    def share(wanted: Sequence[str]) -> float | None:
        rows = [row for row, name in enumerate(names) if name in wanted]
        return float(shows[rows].float().mean()) if rows else None

    others = [name for name in concept_set.concepts if name not in concepts]
    forget = share(concepts)
    assert forget is not None
    return {"forget": 1 - forget, "relapse": share(concepts[:-1]), "retain": share(others), **held(pipeline, edit)}


def make(cell: Cell, root: Path) -> dict[str, Any]:
    """Make a result."""
    if cell.measure == "sequence":
        return sequence(cell.method, root, options=partial(retained, cell.method), together=cell.method in OURS)
    if cell.measure in ("ten", "twenty"):
        concepts, options = (TEN[0], []) if cell.measure == "ten" else (TWENTY, retained(cell.method, TWENTY))
        found = tested(cell.method, concepts, root, options)
        pipeline, _, edit = load(edited(cell.method, concepts, root, options))
        return {**found, **held(pipeline, edit)}
    if cell.measure == "clean":
        return tested(cell.method, [cell.concept], root)
    checkpoint = edited(cell.method, [cell.concept], root)
    if cell.measure == "token":
        return token(checkpoint, cell.concept)
    if cell.measure == "probes":
        from lit_unlearn.attacks.relearning import Relearning

        return attacked(checkpoint, [*PROBES, Relearning(pictures="others"), Relearning(parts="all")])
    if cell.measure == "strong":
        folder = root / "strong" / cell.method / joint_name([cell.concept])
        return attacked(checkpoint, ["concept_inversion"], output=folder, budget=4, restarts=3)
    return attacked(checkpoint, ATTACKS)


def main() -> None:
    """Make the results that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "logs/bench/leaders", "docs/results/leaders.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--concepts", nargs="+", default=list(SINGLE), choices=SINGLE)
    arguments = parser.parse_args()
    make_stored(arguments, make_cells(arguments), make, tables, "Which method leads")


if __name__ == "__main__":
    main()
