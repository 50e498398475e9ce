"""Finds the parts of the embedded model: in its folder, or in the runs that trained them."""

from __future__ import annotations

from pathlib import Path

from lit_unlearn.diffusion.source import resolve_model

FOLDER = "pretrained"
"""Folder of a run with the parts that it trained, in the layout of the embedded model."""


def trained_part(part: str, run: str | None, model: str, field: str = "model") -> Path:
    """Folder of ``part``: from the run in the folder ``run``, or from ``model`` if ``run`` is None.

    Args:
        part: Name of the part.
        run: Folder of a run that has trained it.
        model: A pipeline that has it.
        field: Name of the argument that gave ``model``, for the message.

    Raises:
        ValueError: The part does not exist there.
    """
    folder = Path(resolve_model(model)) / part if run is None else Path(run) / FOLDER / part
    if not (folder / ("tokenizer_config.json" if part.startswith("tokenizer") else "config.json")).is_file():
        where = f"{field}={model!r}" if run is None else f"the run {run}"
        whole = run is None and field == "start"
        remedy = "emoji-dit, or a pipeline like it" if whole else "a run that has trained it to its end"
        raise ValueError(f"{where} has no {part} ({folder}): give {remedy}.")
    return folder
