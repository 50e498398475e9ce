"""Runs of the trainer, as the commands ``fit`` and ``test`` start them, without its names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.api.edited import Edit, Place, edit_of, path_of, text_of
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors
from lit_unlearn.training.early import check_early
from lit_unlearn.training.recipes import find_recipe, resolve_recipes

if TYPE_CHECKING:
    from lit_unlearn.data.concepts import ConceptSet
    from lit_unlearn.training.cli import UnlearnCLI

ARGUMENTS = {
    "config",
    "concept",
    "ckpt_path",
    "once",
    "fresh",
    "overwrite",
    "model",
    "base_edit",
    "print_config",
    "help",
}
"""Options of the commands that are arguments of the functions here, or that print something and end the program."""


def edit(
    concept: str | Sequence[str],
    to: str | None = None,
    *,
    recipe: Place | None = None,
    model: Place | None = None,
    revision: str | None = None,
    config_folder: Place | None = None,
    clip_skip: int | None = None,
    concept_set: ConceptSet | Place | None = None,
    kind: str | None = None,
    protect: Sequence[str] = (),
    base_edit: Edit | Place | Sequence[Edit | Place] | None = None,
    judge: str | None = None,
    options: Mapping[str, object] | None = None,
    folder: Place | None = None,
    once: bool = False,
) -> Edit:
    """Edit a model so that it does not draw a concept any more, as ``lit-unlearn fit`` does.

    Args:
        concept: Name of a concept of the set, or several; with ``to``, a name that need not be in any set.
        to: What to draw in its place. A concept set is then written for the concept, as ``lit-unlearn erase`` does, and
            the unedited model is asked for pictures of the concept first.
        recipe: A recipe by name (``null_space``, ``uce``, ``speed``, ``esd``, ...) or path; None for ``null_space``, or
            for ``null_space_context`` if a model is named.
        model: A folder in the diffusers layout, a single file, ``emoji-sd``, ``emoji-dit`` or a hub id; None for the
            recipe's.
        revision: Branch, tag or commit of a hub id.
        config_folder: What a single file does not hold, as for ``Pipeline.load``.
        clip_skip: Layers that prompts are read earlier, as for ``Pipeline.load``.
        concept_set: The concept set, or its name or file; None for the recipe's. A set without a file is written into
            the folder of the runs.
        kind: With ``to``: object (the default), person, character, style, scene, action or content.
        protect: With ``to``: neighbours that must stay, which are judged too.
        base_edit: Earlier edits to start from and to keep; None starts from the model.
        judge: The judge of the run; None for the usual one. With ``to``, ``none`` leaves out the look at the unedited
            model.
        options: Further settings of the recipe, by their keys, as on the command line: ``{"edit.threshold": 0.02}``.
        folder: Folder of all runs; None for the recipe's, which is ``logs``.
        once: Take the run of an earlier call with the same settings, if it is finished.

    Returns:
        The edit, in a new folder ``METHOD/CONCEPT/version_N``. An unfinished run with the same settings is continued.

    Raises:
        UserError: An argument is wrong, or the edit would change nothing.
        OSError: The run's folder cannot be written.
    """
    names = [concept] if isinstance(concept, str) else list(concept)
    below = [base_edit] if isinstance(base_edit, str | os.PathLike | Edit) else base_edit or []
    earlier = [str(path_of(one, "base_edit")) for one in below]
    with user_errors():
        given = _options(options, folder=folder, once=once)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"concept={concept!r} names nothing: give the name of a concept, or several.")
        if model is not None and not isinstance(model, str | os.PathLike):
            raise ValueError("model is a pipeline that is loaded: give the folder or the name that it was loaded from.")
        beside = {"concept_set": concept_set, "config_folder": config_folder, "concepts": len(names) > 1 or None}
        if to is not None and (other := [name for name, value in beside.items() if value is not None]):
            what = "several concepts" if other == ["concepts"] else other[0]
            raise ValueError(f"to={to!r} is for one concept without a set and does not go with {what}: choose one.")
        if to is None and (kind is not None or protect):
            what = f"kind={kind!r}" if kind is not None else f"protect={protect!r}"
            raise ValueError(f"{what} is for a concept that is in no set: say what to draw in its place, with to.")
    if to is not None:
        written = _erasure(
            names[0], to, kind or "object", protect, recipe, model, revision, judge, folder, earlier, clip_skip
        )
        return _fitted([*written, *given])
    file = find_recipe(os.fspath(recipe) if recipe else "null_space" if model is None else "null_space_context")
    settings = {"model": text_of(model), "revision": revision, "judge": judge, "config_folder": text_of(config_folder)}
    settings["clip_skip"] = None if clip_skip is None else str(clip_skip)
    with user_errors():
        settings["concept_set"] = None if concept_set is None else _placed(concept_set, names, file, folder)
    more = [f"--model.{name}={value}" for name, value in settings.items() if value is not None]
    more += [f"--base_edit={place}" for place in earlier]
    return _fitted(["--config", str(file), f"--concept={_listed(names)}", *more, *given])


def score(
    edit: Edit | Place,
    *,
    judge: str | None = None,
    images_per_prompt: int | None = None,
    options: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw all evaluation prompts with and without the edit and judge the pictures, as ``lit-unlearn test`` does.

    Args:
        edit: The edit of a run, or its folder or checkpoint.
        judge: The judge; None for the run's.
        images_per_prompt: Pictures of each prompt; None for as many as the run's recipe says.
        options: Further settings, by their keys, such as ``{"data.eval_batch_size": 8}``.
        overwrite: Replace earlier scores of the run.

    Returns:
        The content of ``scores.json``: ``forget``, ``retain``, ``harmonic_mean``, ``intervals``, ``per_concept``, and
        the same ``before`` the edit; see ``docs/evaluation.md``.

    Raises:
        UserError: An argument is wrong, the run was scored before, or the edit is not in a run's folder.
        OSError: The scores cannot be written.
    """
    given = edit_of(edit)
    folder = given.folder
    if folder is None or not (folder / "config.yaml").is_file():
        raise UserError(
            f"{given.path} does not lie in a run's folder, whose recipe says what to score: give the folder of the run."
        )
    settings = {"model.judge": judge, "data.images_per_prompt": images_per_prompt}
    more = {name: value for name, value in settings.items() if value is not None}
    with user_errors():
        passed = _options({**more, **(options or {})}, overwrite=overwrite)
    _run("test", "--config", str(folder / "config.yaml"), "--ckpt_path", str(given.path), *passed)
    found = given.scores
    if found is None:
        raise UserError(
            f"{given.path} edits no concept ({given.method}): its scores are in memorisation.json beside it."
        )
    return found


def _run(*args: str) -> UnlearnCLI:
    """Run a command of the trainer; random numbers go on afterwards as if nothing had been drawn.

    Raises:
        UserError: The recipe or a value is wrong.
    """
    resolved = resolve_recipes(args)
    check_early(resolved)
    from lightning.pytorch.utilities.seed import isolate_rng

    from lit_unlearn.training import cli as training

    with isolate_rng():
        return training.run(resolved)


def _fitted(args: Sequence[str]) -> Edit:
    """The edit of a fit."""
    done = _run("fit", *args)
    if done.finished_before is not None:
        return Edit(done.finished_before)
    return Edit(done.trainer.log_dir or done.trainer.default_root_dir)


def _options(options: Mapping[str, object] | None, folder: Place | None = None, **flags: bool) -> list[str]:
    """Settings of a recipe as options of the command line.

    Raises:
        ValueError: A key is an argument of the function, or a value cannot be written.
    """
    found = [f"--{name}" for name, value in flags.items() if value]
    if folder is not None:
        found.append(f"--trainer.default_root_dir={os.fspath(folder)}")
    for key, value in (options or {}).items():
        if key in ARGUMENTS or key.endswith(".help") or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise ValueError(f"options has {key!r}, which is not the key of a setting, such as edit.threshold.")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            found.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        except TypeError as error:
            raise ValueError(
                f"options[{key!r}] is a {type(value).__name__}: give a number, a text, a list or a mapping."
            ) from error
    return found


def _erasure(
    concept: str,
    to: str,
    kind: str,
    protect: Sequence[str],
    recipe: Place | None,
    model: Place | None,
    revision: str | None,
    judge: str | None,
    folder: Place | None,
    earlier: Sequence[str],
    clip_skip: int | None,
) -> list[str]:
    """Write a concept set and a recipe for a concept that is in no set; the arguments of its fit.

    Raises:
        UserError: An argument is wrong, or the model does not draw the concept.
        OSError: They cannot be written.
    """
    from lit_unlearn.training.erasure import Request, check_drawn, check_request, plan_of

    with user_errors(), plain_warnings():
        request = Request(
            concept,
            to,
            kind,
            protect=[protect] if isinstance(protect, str) else list(protect),
            method=text_of(recipe),
            model=text_of(model),
            revision=revision,
            judge=judge,
            folder=text_of(folder),
            base_edit=earlier,
            clip_skip=clip_skip,
        )
        check_request(request)
        plan = plan_of(request)
    plan = check_drawn(plan)
    return ["--config", str(plan.write()), f"--concept={_listed([plan.concept.name])}"]


def _listed(names: Sequence[str]) -> str:
    """Names as the value of ``--concept``: one as it is, several as a list."""
    if len(names) == 1 and not names[0].startswith("["):
        return names[0]
    return json.dumps(list(names), ensure_ascii=False)


def _placed(concept_set: ConceptSet | Place, names: Sequence[str], recipe: Path, folder: Place | None) -> str:
    """Name or file of a concept set; a set that is in no file is written into the folder of its runs.

    Raises:
        ValueError: The set does not have one of the concepts.
        UserError: A file with another set is in its place.
    """
    if isinstance(concept_set, str | os.PathLike):
        return os.fspath(concept_set)
    import yaml

    from lit_unlearn.training.runs import run_name

    own = [concept_set.get(name).name for name in names]
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    root = folder or (content.get("trainer") or {}).get("default_root_dir", "logs")
    place = Path(root, run_name(content.get("method") or recipe.stem, own, concept_set), "concepts.yaml")
    for known in (concept_set.name, str(concept_set.path), str(place)):
        if _holds(known, concept_set):
            return known
    concept_set.save(place)
    return str(place)


def _holds(name_or_path: str, concept_set: ConceptSet) -> bool:
    """Whether the set of that name, or in that file, is ``concept_set``."""
    from lit_unlearn.data.concepts import load_concept_set

    try:
        return load_concept_set(name_or_path).sha256 == concept_set.sha256
    except ValueError:  # there is none, or the file is something else
        return False
