"""``lit-unlearn attack``: attacks the edit of a run, judges pictures of each, and writes the results beside the scores.

Data flow: everything is checked; the pipeline is loaded once, with the values of the edited weights before and after
the edit; both models draw pictures of each concept; then each attack searches, draws the same prompts and seeds again,
and its result is written to ``attacks.json`` before the next attack starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Found
from lit_unlearn.attacks.catalog import check_budget, make_attacks
from lit_unlearn.attacks.drawing import AttackDrawing, judge_controls, result_name
from lit_unlearn.attacks.probing import unrelated_prompts
from lit_unlearn.attacks.restarts import check_restarts
from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.data.cut_prompts import check_cuts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.vocabulary import TABLES, vocabulary_fingerprint, vocabulary_of
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.checkpoint import Edit, load_with_pretrained, read_edit, warn_unfinished
from lit_unlearn.edits.judging import concept_set_of_edit, judge_of_edit
from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.reports.attack_results import FILE, AttackReport, AttackResult, make_result
from lit_unlearn.system.devices import find_device
from lit_unlearn.system.files import atomic_write
from lit_unlearn.system.pixels import save_png

Existing = Literal["refuse", "replace", "keep"]
FOLDER = "attacks"
"""Folder beside ``attacks.json`` for grids and learned embeddings."""


def attack_run(
    ckpt_path: str | Path,
    attacks: Sequence[str | Attack] | None = None,
    *,
    concepts: Sequence[str] | None = None,
    num_pictures: int = 10,
    steps: int | None = None,
    budget: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    judge: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    allow_names: bool = False,
    model: str | None = None,
    revision: str | None = None,
    config_folder: str | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    existing: Existing = "refuse",
    say: Callable[[str], object] = lambda text: None,
) -> list[AttackResult]:
    """Attack the edit of a run.

    Args:
        ckpt_path: A run's checkpoint, or a delta.
        attacks: Names or import paths of attacks, or attack objects with settings; None for all of this package.
        concepts: Edited concepts to attack; None for all of them.
        num_pictures: Number of pictures that are judged for each attack.
        steps: Steps of each attack that is given by its name; None for its default.
        budget: Factor of these default steps, instead of ``steps``.
        restarts: Number of starts of each search that has a random start; see ``RestartableAttack``.
        seed: Seed of pictures and searches.
        guidance_scale: Guidance of all judged pictures and of searches that draw some; None for the run's.
        negative_prompt: Prompt that the guidance leads away from, for the same pictures; None for the empty one.
        judge: Short name, classifier's folder, or import path of the judge; None for the run's judge, if that is one of
            this package.
        judge_options: Arguments of the judge; None for the run's options if the judge is the run's, else the defaults.
        allow_names: Whether searched prompts may contain the concept's own names.
        model: The base model; None for the one that was edited.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: Folder with what a single file does not hold, as for ``BaseModel.find``.
        output: Folder for ``attacks.json`` and ``attacks/``; None for the run's folder.
        device: The device; None takes a GPU if there is one.
        existing: What to do with attacks that already have a result in ``attacks.json``.
        say: Called with a message after each attack.

    Returns:
        The results of all requested attacks, including the results that were kept.

    Raises:
        ValueError: An argument is wrong, which is found before anything is loaded; or the unedited model does not draw
            the concept.
        OSError: The output cannot be written.
    """
    chosen = _chosen_attacks(attacks, steps, allow_names, budget)
    unaffected = [*check_restarts(chosen, restarts), *check_budget(chosen, budget)]
    if num_pictures < 1:
        raise ValueError(f"num_pictures={num_pictures} must be at least 1.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be zero or larger.")
    edit = read_edit(ckpt_path)
    how = AttackDrawing.chosen(edit.hyper_parameters, seed, guidance_scale, negative_prompt)
    warn_unfinished(ckpt_path)
    concept_set = concept_set_of_edit(edit)
    targets = _edited_concepts(edit, concepts, concept_set)
    others = _other_prompts(chosen, edit, concept_set)
    folder = _output_folder(edit, output)
    path, report = folder / FILE, _earlier_report(folder / FILE, edit)
    todo = _todo(report, path, chosen, targets, existing, how)
    if todo:
        for sentence in unaffected:
            say(sentence)
        found_device, base = find_device(device), chosen_base(model, revision, edit, config_folder)
        base.check_steps(how.num_inference_steps, "num_inference_steps")
        for attack in dict.fromkeys(attack for attack, _ in todo):
            attack.check_run(base, how.num_inference_steps, how.guidance_scale)
        if base.reader is not None:
            check_cuts(base.reader, concept_set, targets)
        loaded_judge = judge_of_edit(edit, judge, judge_options, concept_set, [concept for _, concept in todo])
        pipeline, pretrained = load_with_pretrained(base, edit, found_device)
        vocabulary = _vocabulary(pipeline, edit, base)
        if base.reader is None:
            check_cuts(pipeline.reader, concept_set, targets)
        for module in pipeline.parts.values():
            if edit.dtype != torch.float32:  # searches and training need more than half precision
                module.float()
    for concept in dict.fromkeys(concept for _, concept in todo):
        attacked = AttackedModel(
            pipeline,
            pretrained,
            concept,
            loaded_judge,
            how.num_inference_steps,
            how.guidance_scale,
            num_pictures,
            seed,
            restarts=restarts,
            others=others,
            negative_prompt=how.negative_prompt,
            run_guidance_scale=how.run_guidance_scale,
            unrelated=unrelated_prompts(concept_set, [concept_set.get(name) for name in edit.concepts]),
        )
        before = _Before.draw(attacked)
        for attack in (attack for attack, own in todo if own is concept):
            found = attack.run(attacked)
            name = result_name(report, attack.label, concept.name, how)
            result = _result(attack, attacked, found, before, folder, base.name, vocabulary, name, how)
            report = report.merged([result])
            report.save(path)
            say(f"{concept.name}: {attack.label}: {found.text} ({result.seconds:.0f} s)")
    wanted = [report.find(attack.label, concept.name, **how.key) for concept in targets for attack in chosen]
    return [result for result in wanted if result is not None]


@dataclass(frozen=True)
class _Before:
    """Pictures (n, 3, H, W) without an attack, and the judge's verdicts on them."""

    unedited: Tensor
    edited: Tensor
    verdicts: dict[str, list[bool]]

    @classmethod
    def draw(cls, model: AttackedModel) -> _Before:
        edited = model.draw(model.prompts, model.seeds)
        with model.pretrained.restored():
            unedited = model.draw(model.prompts, model.seeds)
        return cls(unedited, edited, {"pre_attack": model.verdicts(edited), "unedited": model.verdicts(unedited)})


def _result(
    attack: Attack,
    model: AttackedModel,
    found: Found,
    before: _Before,
    folder: Path,
    base: str,
    vocabulary: str,
    name: str,
    how: AttackDrawing,
) -> AttackResult:
    """Judge the pictures under the attack; write the grid and the learned embeddings as files called ``name``."""
    pictures = found.draw(model.prompts, model.seeds)
    controls, control_verdicts = judge_controls(model, found)
    rows = [before.unedited, before.edited, pictures, *controls.values()]
    labels = ["unedited", "edited", attack.label.replace("_", " "), *(f"control: {control}" for control in controls)]
    scale = max(1, round(96 / pictures.shape[3]))
    grid = image_grid(rows, labels, model.prompts, scale)
    save_png(folder / FOLDER / f"{name}.png", grid)
    text = found.text
    if found.embeddings is not None:
        text = f"{FOLDER}/{name}.safetensors"
        metadata = {"concept": model.concept.name, "vocabulary": vocabulary, "model": base}
        with atomic_write(folder / text) as file:
            file.write(save({"embeddings": found.embeddings.float().contiguous()}, metadata))
    settings: dict[str, Any] = {
        **attack.settings(),
        **how.settings,
        "judge": model.judge.name,
        **found.report,
    }
    return make_result(
        verdicts={**before.verdicts, "shown": model.verdicts(pictures)},
        controls=control_verdicts,
        attack=attack.label,
        concept=model.concept.name,
        pictures=len(pictures),
        seconds=found.cost.seconds,
        unet_forwards=found.cost.unet_forwards,
        unet_backwards=found.cost.unet_backwards,
        settings=settings,
        found=text,
    )


def _vocabulary(pipeline: Pipeline, edit: Edit, base: BaseModel) -> str:
    """The vocabulary that learned embeddings belong to, as in ``vocabulary_of``; an edited table is a new one."""
    is_edited = any(name.endswith(TABLES) for name in edit.weights)
    if is_edited or (isinstance(base.place, Path) and edit.dtype == torch.float32):  # the table as it is stored
        return vocabulary_fingerprint({text.part: text.table for text in pipeline.texts})
    return vocabulary_of(base.name, base.config_folder)[0]


def _chosen_attacks(
    attacks: Sequence[str | Attack] | None, steps: int | None, allow_names: bool, budget: float | None
) -> list[Attack]:
    if attacks is None:
        return make_attacks(None, steps, allow_names, budget=budget)
    names = [attack for attack in attacks if isinstance(attack, str)]
    if budget is not None and not names:
        raise ValueError(f"budget={budget:g} has no effect on attacks with settings of their own: give their names.")
    made = iter(make_attacks(names, steps, allow_names, budget=budget))
    chosen = [attack if isinstance(attack, Attack) else next(made) for attack in attacks]
    if not chosen or len({attack.label for attack in chosen}) < len(chosen):
        raise ValueError(f"attacks={[attack.label for attack in chosen]}: give at least one, and none twice.")
    return chosen


def _other_prompts(attacks: Sequence[Attack], edit: Edit, concept_set: ConceptSet) -> list[str]:
    """The retained prompts, if one of ``attacks`` learns from their pictures; also asks each if it suits the edit."""
    for attack in attacks:
        attack.check(edit.weights)
    learners = [attack for attack in attacks if attack.learns_from_others]
    prompts = concept_set.retain_prompts(edit.concepts) if learners else []
    if learners and not prompts:
        raise ValueError(
            f"{learners[0].name} learns from pictures of retained concepts, and {concept_set.name!r} has none beside "
            f"{', '.join(edit.concepts)}: leave that out."
        )
    return prompts


def _edited_concepts(edit: Edit, names: Sequence[str] | None, concept_set: ConceptSet) -> list[Concept]:
    if not edit.concepts:
        raise ValueError(f"{edit.path} edits no concept ({edit.method}), so there is none to attack.")
    edited = [concept_set.get(name) for name in edit.concepts]
    if names is None:
        return edited
    chosen = [concept_set.get(name) for name in names]
    for concept in chosen:
        if concept not in edited:
            raise ValueError(
                f"concept={concept.name!r} was not edited by {edit.path}: choose among {', '.join(edit.concepts)}."
            )
    return list(dict.fromkeys(chosen))


def _output_folder(edit: Edit, output: str | Path | None) -> Path:
    if output is not None:
        if Path(output).exists() and not Path(output).is_dir():
            raise ValueError(f"output={output} is a file: give a folder.")
        return Path(output)
    if edit.run_folder is None:
        raise ValueError(f"ckpt_path={edit.path} does not lie in a run's folder: say with --output where to write.")
    return edit.run_folder


def _earlier_report(path: Path, edit: Edit) -> AttackReport:
    """The content of ``attacks.json``, to which results are added."""
    run = edit.run_folder
    in_run = run is not None and run.name.startswith("version_")
    method = run.absolute().parents[1].name if run is not None and in_run else edit.method
    earlier = AttackReport.load(path).attacks if path.exists() else []
    if path.exists() and (found := AttackReport.load(path).concepts) != edit.concepts:
        raise ValueError(
            f"{path} is about an edit of {', '.join(found)}, and {edit.path} edits {', '.join(edit.concepts)}: "
            "give another folder with --output."
        )
    return AttackReport(method=method, concepts=list(edit.concepts), checkpoint=edit.path.as_posix(), attacks=earlier)


def _todo(
    report: AttackReport,
    path: Path,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    existing: Existing,
    how: AttackDrawing,
) -> list[tuple[Attack, Concept]]:
    """The attacks that remain to be run, for each concept."""
    wanted = [(attack, concept) for concept in concepts for attack in attacks]
    there = [pair for pair in wanted if report.find(pair[0].label, pair[1].name, **how.key)]
    if there and existing == "refuse":
        attack, concept = there[0]
        raise ValueError(
            f"{path} has a result of {attack.label} on {concept.name}{how.words}: pass --overwrite to attack again, or "
            "choose other attacks with --attacks."
        )
    return wanted if existing == "replace" else [pair for pair in wanted if pair not in there]
