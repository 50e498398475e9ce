"""Where a model lies: a folder, the embedded one, or the hub; and which of its files are read."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED = "emoji-sd"
"""Name of the model that ships with the project."""


def resolve_model(model: str) -> Path | str:
    """Return the folder that ``model`` stands for, or ``model`` itself if it is a hub id.

    A folder as given comes first; ``emoji-sd`` is then looked up in ``checkpoints/`` and in the installed package.

    Raises:
        ValueError: ``model`` is neither a folder nor shaped like a hub id.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if model.replace("\\", "/") in (EMBEDDED, f"checkpoints/{EMBEDDED}"):  # a run of Windows' may say so
        package = Path(str(files("lit_unlearn")))
        for folder in (Path("checkpoints"), package / "checkpoints", package.parent / "checkpoints"):
            if (folder / EMBEDDED).is_dir():
                return folder / EMBEDDED
    is_path = model.startswith((".", "/", "~", "checkpoints/", "logs/")) or {":", "\\"} & set(model)
    if model.count("/") == 1 and not is_path:
        return model
    raise ValueError(
        f"model={model!r} is no folder and no hub id (owner/name): give a diffusers folder, or {EMBEDDED!r}."
    )


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of a part that are loaded.

    Beside them may lie copies of another variant, such as ``model.fp16.safetensors`` or ``....non_ema.safetensors``:
    those of half precision are taken where there are no others.
    """
    found = sorted((folder / part).glob("*.safetensors"))
    plain = [file for file in found if len(file.suffixes) == 1]
    return plain or [file for file in found if file.suffixes[0].startswith(".fp16")]
