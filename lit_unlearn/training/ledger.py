"""Edits one after another, in two ways.

``--after CKPT`` edits the concepts of an earlier run again, together with the new ones. An edit on top of an edit
undoes part of it: later targets move what earlier ones have written. So a sequence is solved anew from the pretrained
weights, with the pairs of all concepts so far (``lit_unlearn.data.pairs``); its result is that of editing them all at
once. What a sequence needs to know is therefore a list of concepts, which every checkpoint has.

``--base_edit CKPT`` starts from the edited model (``methods.shared.stack``): of another method, of pictures, or of
somebody whose recipe is not known. What the earlier edits have done stays, and the prompts of their concepts are
retained as the edited model has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_unlearn.data.concepts import ConceptSet, concept_set_of, load_concept_set
from lit_unlearn.data.prompts import edited_concepts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.described import DescribedModel
from lit_unlearn.edits.base import check_clip_skip
from lit_unlearn.edits.chain import Link, joined
from lit_unlearn.edits.checkpoint import Edit, read_edit, warn_unfinished
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.stack import Stack, hashes_of
from lit_unlearn.system.errors import UserError, user_errors, warn
from lit_unlearn.system.run_file import check_checkpoint, checkpoint_of


def take_earlier(config: Any, kind: type) -> None:
    """Put the concepts of the runs ``config.after`` before those of ``config.concept``, in the order of their edits.

    ``config.after`` is None afterwards, and the model's ``earlier`` has the concepts' names, so that a recipe that is
    stored does not need the earlier files.

    Args:
        config: The configuration of a command.
        kind: Class of the module.

    Raises:
        UserError: The module edits no concepts, an earlier run edits none, is of another model or another concept set,
            or no concept is new.
    """
    if not config.after:
        return
    if not issubclass(kind, ConceptEditor):
        raise UserError(f"after={config.after[0]} has no effect: {kind.__name__} edits no concepts; leave it out.")
    with user_errors():
        concepts = load_concept_set(config.model.init_args.concept_set)
        edits = _read(config, "after", kind)
        for edit in edits:
            edit.check_set(concepts)
            if not edit.concepts:
                raise UserError(f"after={edit.path} edits no concept, so there is nothing to edit again: leave it out.")
        _put_before(config, "after", edits, concepts)
    config.after = None


def start_from(config: Any, kind: type) -> Stack | None:
    """The edits ``config.base_edit`` that a fit starts from; their concepts come before those of ``config.concept``.

    Args:
        config: The configuration of ``fit``.
        kind: Class of the module.

    Returns:
        What they have left; None if the fit starts from the base model.

    Raises:
        UserError: The module cannot start from an edit; an edit is of another model, another type, or of concepts that
            the set does not have; two of them write the same weight; or no concept is new.
    """
    arguments = config.model.init_args
    if not config.base_edit:
        if arguments.get("retain_earlier"):
            raise UserError("model.retain_earlier=true is set by --base_edit: give the edit to start from instead.")
        return None
    if not issubclass(kind, ConceptEditor) or not kind.changes_weights:
        why = "edits no concepts" if not issubclass(kind, ConceptEditor) else "learns words and edits nothing"
        raise UserError(f"base_edit={config.base_edit[0]} has no effect: {kind.__name__} {why}; leave it out.")
    if config.after:
        raise UserError(
            f"base_edit={config.base_edit[0]} and after={config.after[0]} exclude each other: one starts from an "
            "edited model, the other edits all concepts again from the pretrained one; leave one out."
        )
    with user_errors():
        concepts = load_concept_set(arguments.concept_set)
        edits = _read(config, "base_edit", kind)
        for edit in edits:
            _check_concepts(edit, concepts)
        weights, links, overwritten = checked_together(edits, arguments.dtype)
        _put_before(config, "base_edit", edits, concepts)
    arguments.retain_earlier = True
    config.base_edit = [str(edit.path) for edit in edits]
    for edit in edits:
        warn_unfinished(edit.path)
        if not edit.concepts:
            warn(f"{edit.path} has unlearned pictures, of which no prompt is known: nothing holds that in this fit.")
    return Stack(weights, [link.stored() for link in links], overwritten)


def checked_together(edits: Sequence[Edit], dtype: str) -> tuple[dict[str, Tensor], list[Link], dict[str, Tensor]]:
    """The weights, links and replaced values of edits that a fit starts from (``chain.joined``).

    Args:
        edits: Of one base model.
        dtype: Type of the weights in the fit.

    Raises:
        ValueError: An edit changes nothing, is of another type, or two of them write the same weight.
    """
    for edit in edits:
        edit.check_weights()
        if str(edit.dtype) != f"torch.{dtype}":
            own = str(edit.dtype).removeprefix("torch.")
            raise ValueError(
                f"base_edit={edit.path} was made in {own}, and the fit is in {dtype}: give a recipe with "
                f"model.dtype: {own}."
            )
    return joined(edits)


def check_start(edit: Edit, stack: Stack | None, base_edit: Sequence[str], clip_skip: int | None) -> None:
    """Refuse to go on with a fit that has started from other edits, or that has another clip skip.

    Args:
        edit: The edit in its checkpoint.
        stack: What the command starts from.
        base_edit: Where that lies.
        clip_skip: The command's clip skip.

    Raises:
        UserError: They differ; the message says what to give.
    """
    with user_errors():
        check_clip_skip(edit, clip_skip, "give what its fit had, or leave out --ckpt_path for a new fit")
    before = edit.chain[:-1]
    if hashes_of([link.stored() for link in before]) == hashes_of(stack.links if stack is not None else []):
        return
    on = f"on top of {'; '.join(link.title() for link in before)}" if before else "on the base model"
    if stack is None:
        raise UserError(f"fit: {edit.path} was made {on}: to go on with it, give the --base_edit of its fit.")
    remedy = "give what its fit had" if before else "leave out --base_edit"
    raise UserError(
        f"fit: {edit.path} was made {on}, and base_edit={', '.join(base_edit)} is something else: {remedy}, or leave "
        "out --ckpt_path for a new fit."
    )


def warn_of_what_nothing_holds(module: ConceptEditor) -> None:
    """Say of which earlier edits a fit retains no prompt and no name."""
    if not module.retain_earlier:
        return
    kept = set(module.kept_texts)
    earlier = [c for c in module.every_edited if c.name in module.earlier and c not in module.edited_again]
    if lost := [concept.name for concept in earlier if not kept & {*concept.edit_prompts, *concept.names}]:
        warn(
            f"{type(module).__name__} retains no prompt of {', '.join(lost)} here, so nothing holds the earlier edit: "
            "`test` says how much of it comes back."
        )


def name_all(config: Any, edit: Edit, concepts: list[str]) -> list[str]:
    """Name the concepts of all edits in a checkpoint that is evaluated, if ``config`` names those of the last one.

    Args:
        config: The configuration of ``test``, ``validate`` or ``predict``.
        edit: The edit in the checkpoint.
        concepts: The concepts that the configuration names.

    Returns:
        The concepts that it names now.
    """
    if not edit.chain or concepts != edit.chain[-1].concepts:
        return concepts
    config.concept = config.model.init_args.concept = config.data.init_args.concept = list(edit.concepts)
    return list(edit.concepts)


def _read(config: Any, option: str, kind: type[ConceptEditor]) -> list[Edit]:
    """The edits that an option names, checked to be of the command's base model."""
    arguments, found = config.model.init_args, []
    base = kind.find_base(arguments.model, arguments.revision, arguments.config_folder, arguments.clip_skip)
    planned = isinstance(base, DescribedModel)  # of which no weight is read
    if option == "base_edit" and not planned:
        base.fetch()  # to compare weights, not only names
    for given in config[option]:
        try:
            check_checkpoint(given, option)
        except ValueError as error:
            if option != "base_edit":
                raise
            raise ValueError(
                f"{str(error).removesuffix('.')} (the paths in a run's config.yaml are relative to the folder in which "
                "it was made)."
            ) from error
        if option == "base_edit" and not planned:
            found.append(read_earlier(given, base))
            continue
        found.append(read_edit(checkpoint_of(Path(given).expanduser())))
        if option == "base_edit":
            check_clip_skip(found[-1], base.clip_skip, "give the fit the clip_skip of its base_edit")
        if not planned:
            found[-1].check_base(base)
    return found


def read_earlier(place: str, base: BaseModel) -> Edit:
    """Read an edit to start from: the folder of a run, a checkpoint or a delta.

    Raises:
        ValueError: It is no edit, or one of another model.
    """
    edit = read_edit(checkpoint_of(Path(place).expanduser()))
    check_clip_skip(edit, base.clip_skip, "give the fit the clip_skip of its base_edit")
    edit.check_base(base)
    edit.check_whole(base)
    return edit


def _put_before(config: Any, option: str, edits: Sequence[Edit], concepts: ConceptSet) -> None:
    """Put the concepts of earlier edits before the new ones, and name them as the module's ``earlier``."""
    arguments = config.model.init_args
    new = [c.name for c in edited_concepts(arguments.concept, concepts)] if arguments.concept is not None else []
    earlier = list(dict.fromkeys(name for edit in edits for name in edit.concepts))
    if not (added := [name for name in new if name not in earlier]):
        raise UserError(
            f"concept={', '.join(new) or None} adds nothing to what {option}={', '.join(config[option])} edits already "
            f"({', '.join(earlier)}): name a new concept."
        )
    again = [name for name in new if name in earlier]
    if again and option == "base_edit" and not arguments.retain_earlier:  # not the recipe of such a run
        warn(f"{', '.join(again)}: edited in {', '.join(config[option])} already, and left as it is there.")
    config.concept = arguments.concept = config.data.init_args.concept = [*earlier, *added]
    arguments.earlier = earlier


def _check_concepts(edit: Edit, concepts: ConceptSet) -> None:
    """Refuse an edit whose concepts the set has not, or has with other prompts: they are retained and scored with it.

    Raises:
        ValueError: Which concept, and what to do.
    """
    if edit.concept_set_sha256 == concepts.sha256:
        return
    before = concept_set_of(edit.concept_set, edit.path).concepts if edit.concept_set is not None else None
    for name in edit.concepts:
        own = concepts.concepts.get(name)
        if own is None or (before is not None and before.get(name) != own):
            has = "does not have" if own is None else "describes otherwise"
            raise ValueError(
                f"base_edit={edit.path} edits {name!r}, which the concept set {concepts.name!r} ({concepts.path}) "
                f"{has}: copy its entry from the set of that edit, since its prompts are retained and judged."
            )
