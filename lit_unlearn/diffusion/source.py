"""Finds a model (a folder, a single file, a model of the project, or the hub) and chooses the files that are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lit_unlearn.system.json_files import read_json

EMBEDDED = "emoji-sd"
"""Name of the model that ships with the project and that recipes edit if they are given no other."""

SHIPPED = (EMBEDDED, "emoji-dit")
"""Names of all models that ship with the project."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of checkpoints that are pickles."""

SINGLE_FILE = (".safetensors", *PICKLES, ".gguf")
"""Endings of files with a whole model, as used by web UIs."""

GGUF = "is a GGUF file, whose weights are too coarse for an edit: give the safetensors in 16 or 32 bits it was made of"
"""Why a file in the format of llama.cpp is refused."""

POINTER = b"version https://git-lfs"
"""Beginning of a pointer file, which stands for a file that git-LFS has not downloaded."""

STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Beginnings of the names of the weight files of all families' parts; the libraries do not read other files."""


def resolve_model(model: str, single_file: bool = False) -> Path | str:
    """Return the folder or the single file that ``model`` stands for, or ``model`` itself if it is a hub id.

    A folder with this path is tried first (``~`` is the home folder); a name in ``SHIPPED`` is then looked up in
    ``checkpoints/`` and in the installed package.

    Args:
        model: The model as the user gave it.
        single_file: Whether it may be one file of safetensors.

    Raises:
        ValueError: ``model`` is none of these: another file, a URL, a path that does not exist.
    """
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        return path
    if single_file and path.suffix.lower() == ".safetensors" and os.path.isfile(path):
        return path
    name = model.replace("\\", "/").removeprefix("checkpoints/")  # a run made on Windows may have \
    if name in SHIPPED and (folder := shipped_folder(name)):
        return folder
    if reason := _not_a_model(model, path):
        raise ValueError(f"model={model!r} {reason}.")
    return model


def shipped_folder(name: str) -> Path | None:
    """The folder of the model ``name`` of ``SHIPPED``, or None if it is in neither ``checkpoints/`` nor the package."""
    package = Path(str(files("lit_unlearn")))
    places = (Path("checkpoints"), package / "checkpoints", package.parent / "checkpoints")
    return next((place / name for place in places if (place / name).is_dir()), None)


def _not_a_model(model: str, path: Path) -> str:
    """The reason why ``model``, which is not a folder, is not a hub id either; empty if it may be one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if found := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)/?$", model):
        return f"is the address of a page on the hub: give its id, {found[1]!r}"
    is_url, is_file, is_link = "://" in model, os.path.exists(path), os.path.islink(path)
    if model.lower().endswith(SINGLE_FILE) and not is_url:
        if not is_file:
            return "names a single file, which does not exist: check its path"
        if model.lower().endswith(".gguf"):
            return GGUF
        if model.lower().endswith(".safetensors"):
            return "is a single file: give the folder of a model in the diffusers layout"
        if model.lower().endswith(PICKLES):
            made = f"{path.stem}.safetensors"
            return (
                f"is a pickle, which may hold code: convert it with `lit-unlearn convert {path.name} -o {made}`, and "
                f"give {made}"
            )
    if is_url:
        return "is a URL: download the model, as a folder in the diffusers layout or one .safetensors, and give that"
    if model and is_file:
        return "is a file: give one of safetensors, or the folder in the diffusers layout with model_index.json"
    if is_link:
        return f"is a link to {os.readlink(path)}, which does not exist"
    try:
        validate_repo_id(model)
        is_id = model.count("/") == 1 and not model.startswith(("checkpoints/", "logs/"))
    except HFValidationError:
        is_id = False
    if is_id:
        return ""
    shipped = " or ".join(map(repr, SHIPPED))
    return f"is no folder and no hub id (owner/name): give a diffusers folder, a .safetensors file, {shipped}"


def chosen_weights(part: str, names: Iterable[str], place: str) -> tuple[str | None, str] | None:
    """Choose the weight file of a part.

    The plain file is preferred; otherwise the only variant is taken, such as ``model.fp16.safetensors``.

    Args:
        part: A part of ``STEMS``, or an optional part such as ``safety_checker``.
        names: Names of its files.
        place: Name of its folder, for messages.

    Returns:
        The variant (None for the plain file) and the file, which is an index if the weights are in several files. None
        if there are no weights.

    Raises:
        ValueError: There are several variants and no plain file; or both a file and an index.
    """
    stem = STEMS.get(part, "model")  # parts beside these are models of transformers
    pattern = re.compile(rf"{stem}(?:\.(.+))?\.safetensors|{stem}\.safetensors\.index(?:\.(.+))?\.json")
    found: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if (match := pattern.fullmatch(name)) and not re.search(r"-\d+-of-\d+$", match[1] or ""):
            found.setdefault(match[1] or match[2], []).append(name)
    if not found:
        return None
    if None not in found and len(found) > 1:
        listed = ", ".join(name for variant in found.values() for name in variant)
        raise ValueError(
            f"{place} has several variants of its weights ({listed}) and no {stem}.safetensors: keep one of them, or "
            f"name the one to use {stem}.safetensors."
        )
    variant = None if None in found else next(iter(found))
    if len(found[variant]) > 1:
        raise ValueError(f"{place} has {' and '.join(found[variant])}: remove the one that is not to be used.")
    return variant, found[variant][0]


class Origin(NamedTuple):
    """Where the weights are that belong to the configurations in a folder which stands for a single file.

    Attributes:
        file: The single file.
        parts: The parts whose weights it holds.
        rest: Folder with the weights of the other parts; None if there are none.
    """

    file: Path
    parts: tuple[str, ...]
    rest: Path | None


ORIGINS: dict[Path, Origin] = {}
"""Where the weights are, by the folders that stand for single files; this process has made them."""


def weights_folder(folder: Path, part: str) -> Path | None:
    """The folder with the weights of a part: ``folder`` itself, unless it stands for a single file.

    Returns:
        The folder; None if the weights are in the single file.
    """
    if (origin := ORIGINS.get(folder)) is None:
        return folder
    return None if part in origin.parts else origin.rest or folder


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of a part that are loaded, as chosen by ``chosen_weights``; empty if there are none.

    Raises:
        ValueError: As ``chosen_weights``; or an index lists a file that is missing.
    """
    if (origin := ORIGINS.get(folder)) is not None and part in origin.parts:
        return [origin.file]
    place = (weights_folder(folder, part) or folder) / part
    chosen = chosen_weights(part, (file.name for file in place.glob("*")), str(place))
    if chosen is None:
        return []
    index = place / chosen[1]
    if index.suffix != ".json":
        return [index]
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map: copy it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (place / name).is_file():
            raise ValueError(f"{index} lists {name!r:.100}, which is not in its folder: copy the model again.")
    return [place / name for name in names]


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration of a model.

    Raises:
        ValueError: The file is missing, is not JSON, or is not a mapping.
    """
    if path.is_file() and is_pointer(path):
        raise ValueError(f"{path} is a pointer of git-LFS: run `git lfs pull` in its repository.")
    config = read_json(path, "copy the model again")
    if not isinstance(config, dict):
        raise ValueError(f"{path} has no mapping: copy the model again.")
    return config


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer to a file that git-LFS has not downloaded."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def weight_variant(folder: Path, part: str) -> str | None:
    """The variant of a part's weights in ``folder`` that is loaded, such as ``fp16``; None for the plain files."""
    chosen = chosen_weights(part, (file.name for file in (folder / part).glob("*")), str(folder / part))
    return None if chosen is None else chosen[0]


def weighted_parts(folder: Path) -> dict[str, str]:
    """The classes of the parts that hold weights by ``model_index.json``, by name, in the order of ``STEMS``.

    Raises:
        ValueError: The file is missing or broken.
    """
    index = read_config(folder / "model_index.json")
    entries = {part: index.get(part) for part in STEMS}
    return {
        part: str(entry[1])
        for part, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file of safetensors, without reading a tensor.

    Raises:
        ValueError: The file is corrupt.
    """
    try:
        if is_pointer(file):
            raise ValueError(f"{file} is corrupt (a pointer of git-LFS): run `git lfs pull` there, or copy it again.")
        with safe_open(file, framework="pt"):  # checks the header against the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}): copy it again.") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}): copy it again.") from error
    with file.open("rb") as opened:  # safetensors gives a shape only after opening the tensor
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
