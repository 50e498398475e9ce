"""What is done with an edit: attacks, exports, and taking it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_unlearn.api.edited import Edit, Place, edit_of, path_of, text_of
from lit_unlearn.system.errors import plain_warnings, user_errors

if TYPE_CHECKING:
    from lit_unlearn.attacks.base import Attack
    from lit_unlearn.reports.attack_results import AttackResult


def attack(
    edit: Edit | Place,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    *,
    concepts: Sequence[str] | None = None,
    num_pictures: int = 10,
    steps: int | None = None,
    budget: float | None = None,
    restarts: int = 1,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    allow_names: bool = False,
    seed: int = 0,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    judge: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    model: Place | None = None,
    revision: str | None = None,
    config_folder: Place | None = None,
    output: Place | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> list[AttackResult]:
    """Try to bring the concept of an edit back, as ``lit-unlearn attack`` does.

    Args:
        edit: The edit, or the path of a run's folder, of a checkpoint or of a delta (then with ``output``).
        attacks: Name or import path of an attack, an attack object, or several; None for all of the package.
        concepts: Edited concepts to attack; None for all.
        num_pictures: Pictures that each attack is judged by.
        steps: Steps of each attack; None for each attack's own.
        budget: Factor of the attacks' own steps, instead of ``steps``.
        restarts: Starts of each search; the one that works best on other pictures is kept.
        settings: Fields of attacks by their names: ``{"prompt_search": {"num_tokens": 8}}``.
        allow_names: Whether searched prompts may contain the concept's own names.
        seed: Seed of pictures and searches.
        guidance_scale: Guidance of the attacker's pictures; None for the run's.
        negative_prompt: Prompt that the attacker's guidance leads away from; None for the empty one.
        judge: The judge; None for the run's.
        judge_options: Arguments of the judge.
        model: The model that was edited, if a delta does not say where it lies.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: What a single file does not hold, as for ``Pipeline.load``.
        output: Folder for ``attacks.json`` and ``attacks/``; None for the run's.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.
        overwrite: Run attacks again that have results.

    Returns:
        A result for each attack and concept: ``shown`` is the share of pictures that show the concept under attack,
        ``pre_attack`` without an attack, ``unedited`` without the edit.

    Raises:
        UserError: An argument is wrong, an attack has results already, or the unedited model does not draw the concept.
        OSError: The results cannot be written.
    """
    from lit_unlearn.attacks.base import Attack
    from lit_unlearn.attacks.catalog import check_budget, make_attacks
    from lit_unlearn.attacks.run import attack_run
    from lit_unlearn.system.devices import explaining_memory, find_device

    path = path_of(edit)
    chosen = [attacks] if isinstance(attacks, str | Attack) else attacks
    with user_errors():
        place = find_device(device)
        names = None if chosen is None else [one for one in chosen if isinstance(one, str)]
        given = {"steps": steps, "budget": budget, "settings": settings or None, "allow_names": allow_names or None}
        for name, value in given.items():
            if names == [] and value is not None:
                raise ValueError(
                    f"{name}={value} has no effect on attacks with settings of their own: give their names."
                )
        made = make_attacks(names, steps, allow_names, settings, budget=budget)
        for sentence in check_budget(made, budget) if made else ():
            print(sentence)
        wanted = made if chosen is None else [one if isinstance(one, Attack) else made.pop(0) for one in chosen]
    ways = ["attack on the processor (--device cpu)"] if place.type != "cpu" else []
    with user_errors(), plain_warnings(), explaining_memory("attack", place, ways):
        return attack_run(
            path,
            wanted,
            concepts=concepts,
            num_pictures=num_pictures,
            restarts=restarts,
            seed=seed,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            judge=judge,
            judge_options=judge_options,
            model=text_of(model),
            revision=revision,
            config_folder=text_of(config_folder),
            output=text_of(output),
            device=device,
            existing="replace" if overwrite else "refuse",
            say=print,
        )


def export(
    edit: Edit | Place,
    output: Place,
    *,
    format: Literal["folder", "delta", "lora", "single"] = "folder",
    rank: int | Literal["auto", "exact"] | None = None,
    lora_names: Literal["kohya", "diffusers"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    names: Literal["2022"] | None = None,
    single_file: Place | None = None,
    model: Place | None = None,
    revision: str | None = None,
    config_folder: Place | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    license: str | None = None,
) -> Path:
    """Write the edit for other programs, as ``lit-unlearn export`` does.

    Args:
        edit: The edit, or the path of a run's folder, of a checkpoint or of a delta.
        output: Folder to write; for all formats but ``folder``, a folder or a file of safetensors.
        format: ``folder`` (the whole model, for diffusers), ``delta`` (the changed weights), ``lora``, or ``single`` (a
            copy of the model's single file with the edit).
        rank: Of ``lora``: the largest rank, ``exact`` for no loss, None or ``auto`` for the rank that is needed.
        lora_names: Of ``lora``: ``diffusers`` for its own names; None or ``kohya`` for those that diffusers, webui,
            Forge and ComfyUI read.
        dtype: Type of the weights; None for the run's.
        names: ``2022`` for a folder whose weights have the names that older tools read.
        single_file: Of ``single``: the file to copy; None for the edited model, if it is one.
        model: The model that was edited, if a delta does not say where it lies.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: What a single file does not hold, as for ``Pipeline.load``.
        overwrite: Replace an earlier export, or add to a repository that exists.
        push_to_hub: ``OWNER/NAME`` of a repository of the Hugging Face Hub to upload the export to, with a card; its
            address is printed.
        private: Of ``push_to_hub``: make a private repository.
        license: Of ``push_to_hub``: identifier of the card's licence, such as ``creativeml-openrail-m``.

    Returns:
        The folder or the file that was written.

    Raises:
        UserError: An argument is wrong, the output exists, the edit has no such form, or the Hub refuses the upload.
        OSError: The output cannot be written.
    """
    from lit_unlearn.edits.form_checks import check_form, check_push

    with user_errors():
        check_form(format, rank, dtype, names, text_of(single_file), lora_names)
        check_push(push_to_hub, private, license)
    from lit_unlearn.edits.forms import export_edit

    hub = None
    if push_to_hub:
        from lit_unlearn.edits.publish import checked_hub

        hub = checked_hub(push_to_hub, private, license, overwrite)
    made = export_edit(
        path_of(edit),
        Path(output),
        format,
        rank=rank,
        lora_names=lora_names,
        dtype=dtype,
        names=names,
        single_file=text_of(single_file),
        model=text_of(model),
        revision=revision,
        config_folder=text_of(config_folder),
        overwrite=overwrite,
    )
    if hub is not None:
        with user_errors(), plain_warnings():
            print(f"{hub.upload(made, format, path_of(edit))}: uploaded")
    return made.path


def undo(
    edit: Edit | Place,
    which: int | str,
    output: Place,
    *,
    model: Place | None = None,
    revision: str | None = None,
    config_folder: Place | None = None,
    overwrite: bool = False,
) -> Edit:
    """Take one edit out of several that lie on top of each other, as ``lit-unlearn undo`` does.

    Args:
        edit: The last of them, or the path of its run's folder, of its checkpoint or of a delta.
        which: The edit to take out: its place, counted from 1, or a concept that it edited.
        output: Delta to write.
        model: The model that was edited, if a delta does not say where it lies.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: What a single file does not hold, as for ``Pipeline.load``.
        overwrite: Replace an earlier export.

    Returns:
        The others, in the delta.

    Raises:
        UserError: There is no such edit, a later one has changed its weights, or the output exists.
        OSError: The output cannot be written.
    """
    from lit_unlearn.edits.chain import links_of
    from lit_unlearn.edits.undo import find_link, write_without

    content = edit_of(edit).content
    with user_errors(), plain_warnings():
        written, _ = write_without(
            content,
            find_link(links_of(content), which),
            output,
            model=text_of(model),
            revision=revision,
            config_folder=text_of(config_folder),
            overwrite=overwrite,
        )
    return Edit(written)
