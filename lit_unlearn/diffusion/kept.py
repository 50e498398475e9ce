"""Files of a base model that are not loaded but belong in an export: a safety checker, licences, embeddings, etc."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import FAMILIES, StableDiffusion
from lit_unlearn.diffusion.parts import KINDS
from lit_unlearn.diffusion.public_name import hub_snapshot
from lit_unlearn.diffusion.source import STEMS, weight_files, weighted_parts

OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Optional parts of a pipeline, which edits never change."""
LIBRARIES = ("transformers", "diffusers", "stable_diffusion")
"""Libraries that the classes of parts may come from; any other class is code beside the model."""
RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that transformers no longer has, by their old name."""
ENDINGS = (".safetensors", ".json", ".md", ".png", ".txt")
"""Endings of files without code; ``txt`` is for the merges of a tokenizer."""
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
"""Beginnings of file names that are allowed without an ending."""
ORIGINAL = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")
"""Beginnings of the names of weights in a single file of the original code."""
INDEX, PROVENANCE = "model_index.json", "provenance.json"
PICTURES = "unedited.safetensors"
"""Pictures that a model draws, which come with it; see ``emoji.unedited``."""
FROM_HUB = ("*.json", "*.txt", "*.md", "*.png", *(f"{name}*" for name in LEGAL))
"""Files that are downloaded from the hub, together with the weights of ``OPTIONAL_PARTS``."""

UNSAFE = "it may hold code: only .safetensors, .json, .md, .png and .txt are copied, and licences"
CORRUPT = "it is corrupt"
UNEDITED = "it has weights by the names of the model's, which the edit does not reach"


@dataclass
class Kept:
    """The files and parts that an export copies from its base.

    Attributes:
        files: Files of the base, by their names in the export.
        left_out: The reason why a file or a part is not copied, by its name in the base.
        index: Entries of ``model_index.json``.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)


def kept_of(base: BaseModel, weights: Collection[str]) -> Kept:
    """The files and parts that an export copies from ``base``, without hidden files, the README and loaded parts.

    Args:
        base: The model.
        weights: Full names of all its weights.

    Raises:
        ValueError: The base's ``model_index.json`` cannot be read.
    """
    folder = base.folder if isinstance(base.place, Path) else _fetch(base)
    kept = Kept()
    if not isinstance(base.place, Path):
        kept.left_out["other files"] = (
            f"of a model from the hub, only {', '.join(FROM_HUB)} and optional parts are copied"
        )
    if folder is None:
        kept.left_out = {"all other files": "they are not in the hub's cache, and the hub cannot be reached"}
        if base.folder is None or base.family is StableDiffusion:
            kept.index["requires_safety_checker"] = False
        return kept
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    listed = {name for name, entry in index.items() if isinstance(entry, list) and None not in entry}
    family = FAMILIES.get(index.get("_class_name"), StableDiffusion)
    parts = listed - set(family.declared)
    for part in sorted(parts):
        if reason := _keep_part(folder, part, index[part], kept):
            kept.left_out[part] = reason
    if family is StableDiffusion:  # pipelines of other families have no safety checker
        kept.index["requires_safety_checker"] = (
            "safety_checker" not in kept.left_out and index.get("requires_safety_checker", True) is not False
        )
    names = frozenset(weights)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] not in parts and name != INDEX:
            _keep_file(folder, path, names, kept)
    return kept


def _fetch(base: BaseModel) -> Path | None:
    """The folder of a model of the hub with the files that an export copies; None if the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*FROM_HUB, *(f"{part}/*.safetensors" for part in OPTIONAL_PARTS)]
    try:
        return Path(snapshot_download(str(base.place), revision=base.commit or base.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    """Files of a model, sorted, without hidden files such as git's."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or path.is_file()):
            yield path


def _keep_part(folder: Path, part: str, entry: list[Any], kept: Kept) -> str | None:
    """Add an optional part to ``kept``, or return why it is left out."""
    if part not in OPTIONAL_PARTS:
        return "it is not a part of the pipeline that is written"
    if len(entry) != 2 or entry[0] not in LIBRARIES or not isinstance(entry[1], str):
        return f"its class is code of its own ({entry!r:.100})"
    files = list(_files(folder / part))
    if not files:
        return f"{INDEX} names it, but there are no files of it"
    try:
        loaded = weight_files(folder, part)
    except ValueError as error:
        return str(error)
    variant = [path for path in loaded if len(path.suffixes) > 1]
    if not loaded and (folder / part / "config.json").exists():
        return "it has no weights as safetensors"
    if any(_stored(path) is None for path in loaded):
        return CORRUPT
    if len(variant) > 1:
        return "its weights are a variant in several files"
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path in variant:
            kept.files[f"{part}/{path.name.partition('.')[0]}.safetensors"] = path
        elif path.suffix == ".safetensors" and path not in loaded:
            kept.left_out[name] = "another variant of the same weights is copied"
        elif reason := _unsafe(folder, path):
            kept.left_out[name] = reason
        else:
            kept.files[name] = path
    if not any(name.startswith(f"{part}/") for name in kept.files):
        return "none of its files can be copied"
    kept.index[part] = [entry[0], RENAMED.get(entry[1], entry[1])]
    return None


def _keep_file(folder: Path, path: Path, names: frozenset[str], kept: Kept) -> None:
    """Add a file outside the optional parts to ``kept``, or to its ``left_out`` with the reason; skip loaded files."""
    name = path.relative_to(folder).as_posix()
    part = name.partition("/")[0]
    export = next((parent for parent in path.parents if parent != folder and (parent / INDEX).is_file()), None)
    of_a_part = part in weighted_parts(folder)
    loaded = of_a_part and (path in weight_files(folder, part) or ".safetensors.index" in path.name)
    if loaded or name.upper() == "README.MD":
        return
    if export is not None and export.is_relative_to(folder):
        kept.left_out[export.relative_to(folder).as_posix()] = "it is a model of its own"
    elif name == PROVENANCE:
        kept.left_out[name] = "it is of the edit that made the base"
    elif name == PICTURES:
        kept.left_out[name] = "it has pictures by the model before the edit"
    elif reason := _unsafe(folder, path) or _reaches_back(path, of_a_part, names):
        kept.left_out[name] = reason
    else:
        kept.files[name] = path


def _unsafe(folder: Path, path: Path) -> str | None:
    """The reason why a file must not be copied, whatever its purpose; None if it may."""
    target = Path(os.path.realpath(path))
    inside = [Path(os.path.realpath(folder))]
    if hub_snapshot(folder):
        inside.append(inside[0].parents[1])  # the hub's cache links to its blobs
    if not any(target.is_relative_to(place) for place in inside) or not target.is_file():
        return "it is a link that leads out of the model"
    legal = path.suffix == "" and path.name.upper().startswith(LEGAL)
    return None if legal or path.suffix in ENDINGS else UNSAFE


def _stored(path: Path) -> list[str] | None:
    """Names of the weights in a file of safetensors, or None if it is corrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError:
        return None


def _reaches_back(path: Path, of_a_part: bool, names: frozenset[str]) -> str | None:
    """The reason why a file of weights is not copied: it is corrupt, or contains weights of the model; else None."""
    if path.suffix != ".safetensors":
        return None
    if of_a_part:
        return UNEDITED
    stored = _stored(path)
    if stored is None:
        return CORRUPT
    for name in stored:
        spelled = {kind.parameter_name(name) for kind in KINDS.values()}
        if name.startswith(ORIGINAL) or any(f"{part}.{each}" in names for part in STEMS for each in spelled):
            return UNEDITED
    return None
