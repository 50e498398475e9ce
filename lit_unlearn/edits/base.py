"""The base model of an edit, as a command names it or as the edit does, read as the edit's fit has read it."""

from __future__ import annotations

import os
from pathlib import Path

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import ImpossibleClipSkipError
from lit_unlearn.diffusion.public_name import LOCAL_NAME
from lit_unlearn.diffusion.source import EMBEDDED
from lit_unlearn.edits.checkpoint import Edit


def chosen_base(
    model: str | None,
    revision: str | None,
    edit: Edit | None,
    config_folder: str | None = None,
    clip_skip: int | None = None,
) -> BaseModel:
    """Find and check the model to load: the given one, else the one that was edited, else the embedded one.

    Args:
        model: Its name, if given.
        revision: Branch, tag or commit, if the model is a hub id; None takes the edit's.
        edit: The edit that will be applied to it, if there is one.
        config_folder: What a single file does not hold, as for ``BaseModel.find``; None takes the edit's if it exists.
        clip_skip: Layers that prompts are read earlier, as for ``BaseModel.find``; None takes the edit's.

    Raises:
        ValueError: The model does not exist, or the edit was not made on it, or not with this clip skip.
    """
    if edit is None:
        return BaseModel.find(EMBEDDED if model is None else model, revision, config_folder, clip_skip)
    if clip_skip is not None:
        check_clip_skip(edit, clip_skip, "leave clip_skip out")
    local = LOCAL_NAME.fullmatch(edit.model)
    if model is None and local is not None and not Path(edit.model).exists():
        kind = "file" if local[1].endswith(".safetensors") else "folder"
        raise ValueError(
            f"{edit.path} edits a model in a {kind} called {local[1]!r} and does not say where that lies: name it with "
            "--model."
        )
    name, of_edit = edit.model if model is None else model, edit.hyper_parameters
    folder = of_edit.get("config_folder")
    if config_folder is None and folder is not None and os.path.isfile(name) and os.path.isdir(folder):
        config_folder = folder
    return base_of(edit, name, revision or of_edit.get("revision"), config_folder)


def base_of(edit: Edit, model: str, revision: str | None, config_folder: str | None) -> BaseModel:
    """Find the model that an edit will be applied to, read with its clip skip, and check it.

    Args:
        edit: The edit.
        model: As for ``BaseModel.find``, as the others.
        revision: Branch, tag or commit.
        config_folder: What a single file does not hold.

    Raises:
        ValueError: The model does not exist, the edit was not made on it, or it does not have the edit's clip skip.
    """
    try:
        base = BaseModel.find(model, revision, config_folder, edit.clip_skip)
    except ImpossibleClipSkipError as error:
        possible = "the model has no clip skip" if error.remedy == "leave it out" else f"possible is {error.remedy[5:]}"
        raise ValueError(
            f"{edit.path} stores clip_skip={edit.clip_skip}, which is impossible here ({error.why}; {possible}): the "
            "file is damaged, or its edit is of another model; get it from its author again, or give its own model."
        ) from error
    edit.check_base(base)
    return base


def check_clip_skip(edit: Edit, clip_skip: int | None, remedy: str) -> None:
    """Refuse another clip skip than that of an edit's fit, which reads prompts otherwise.

    Args:
        edit: The edit.
        clip_skip: The clip skip that is asked for; None for none.
        remedy: What to do, the end of the sentence.

    Raises:
        ValueError: It is another one.
    """
    if clip_skip != edit.clip_skip:
        own = "without clip_skip" if edit.clip_skip is None else f"with clip_skip={edit.clip_skip}"
        asked = "without it" if clip_skip is None else f"with clip_skip={clip_skip}"
        raise ValueError(f"{edit.path} was made {own}, and would be used {asked}: {remedy}.")
