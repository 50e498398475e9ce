"""Where the parts of the embedded model lie: in its folder, or in the runs that have trained them."""

from __future__ import annotations

from pathlib import Path

from lit_unlearn.diffusion.source import resolve_model

FOLDER = "pretrained"
"""Where a run keeps what it has trained, as the embedded model's folder has it."""


def trained_part(part: str, run: str | None, model: str) -> Path:
    """Folder of ``part``: what the run in the folder ``run`` has trained, or that of ``model`` if there is none.

    Raises:
        ValueError: There is no such part.
    """
    folder = Path(resolve_model(model)) / part if run is None else Path(run) / FOLDER / part
    if not (folder / ("tokenizer_config.json" if part == "tokenizer" else "config.json")).is_file():
        where = f"model={model!r}" if run is None else f"the run {run}"
        raise ValueError(f"{where} has no {part} ({folder}): give a run that has trained it to its end.")
    return folder
