"""Compares an export with its provenance and with its base model; no code in the export is run, no file trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import check_clip_skip, how_to_draw, is_number
from lit_unlearn.diffusion.kept import ENDINGS, INDEX, PROVENANCE, kept_of
from lit_unlearn.diffusion.provenance import PROVENANCE as SINGLE
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.edits.chain import name_of
from lit_unlearn.edits.checkpoint import WEIGHT_NAME, read_edit
from lit_unlearn.edits.export import file_sha256, places_of, weights_sha256
from lit_unlearn.edits.public import TEXTS, Places, public_content, without_any
from lit_unlearn.edits.single_file import SingleFile

MAX_PROVENANCE = 50_000_000
"""Size limit of ``provenance.json``, in bytes."""
LONGEST_NOTE = 200
"""Most characters of what a file says about how to draw with it."""
SHOWN = 5
"""Maximum number of names in a row of the table."""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        what: What was checked.
        wrong: Names of the items that differ, with the reason; empty if the check passed.
        count: Number of items that were checked.
        note: What a user of the export must know, in a line; empty for nothing.
    """

    what: str
    wrong: list[str]
    count: int
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return not self.wrong


def findings_table(findings: list[Finding]) -> Table:
    """One row for each check."""
    table = Table("check", "result", box=None)
    for finding in findings:
        more = f" and {len(finding.wrong) - SHOWN} more" if len(finding.wrong) > SHOWN else ""
        lines = "; ".join(finding.wrong[:SHOWN]) + more
        table.add_row(finding.what, f"ok ({finding.count})" if finding.ok else escape(printable(lines)))
    return table


def printable(text: str) -> str:
    """``text`` without characters that control a terminal."""
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", "?", text)


def verify_export(path: Path, base: BaseModel | None = None) -> list[Finding]:
    """Check a folder, a single file, a delta or LoRA weights.

    Args:
        path: A folder or file that ``lit-unlearn export`` wrote.
        base: Base model to compare with: all unedited weights must be equal to its weights. Each is read once.

    Raises:
        ValueError: ``path`` is not an export.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder or file that `lit-unlearn export` has written.")
    if path.is_dir() and not (path / PROVENANCE).exists():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{path} is no export of lit-unlearn: it has no {PROVENANCE}.")
        path = found[0]
    return _verify_folder(path, base) if path.is_dir() else _verify_file(path, base)


def _verify_file(path: Path, base: BaseModel | None) -> list[Finding]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            prefix = SINGLE if f"{SINGLE}kind" in metadata else ""
            names = [] if prefix else file.keys()  # not all weights of a whole model
            weights = {name: file.get_tensor(name) for name in names}
        ours = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        facts = {name: json.loads(value) for name, value in ours.items() if name != "format"}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no export of lit-unlearn, or corrupt ({error!s:.200}).") from error
    if prefix:
        return [*_verify_single(path, facts, base), *_drawing(facts, base)]
    recorded = _mapping(facts, "weights_sha256", path)
    findings = [_compare("weights", weights_sha256(weights), recorded)]
    if facts.get("kind") == "delta":
        edit = read_edit(path)
        known = {*_names(facts, path), *map(name_of, edit.overwritten)}
        names = [name for name in weights if name not in known]
        findings.append(Finding("names", [f"unexpected weight {name}" for name in names], len(weights)))
    if base is not None:
        findings.append(_base_hashes(facts, base, path))
    return [*findings, *_drawing(facts, base)]


def _drawing(facts: Mapping[str, Any], base: BaseModel | None) -> list[Finding]:
    """Check the clip skip of an edit, if it has one, and say how to draw with it; that of the model if it is known."""
    config = facts.get("config")
    stored = facts.get("clip_skip", config.get("clip_skip") if isinstance(config, dict) else None)
    if stored is None:
        return []
    said = facts.get("drawing")
    if not is_number(stored):
        wrong = f"{stored!r:.40} is not a whole number of at least 1: the file is damaged or from another model"
        return [Finding("clip_skip", [wrong], 1)]
    if base is not None:
        try:
            check_clip_skip(stored, base.family, base.names, base.name)
        except ValueError as error:
            wrong = f"{error} The file is damaged or from another model."
            return [Finding("clip_skip", [wrong], 1)]
        said = how_to_draw(base.family, stored, base.names)
    expected = f"draw with clip_skip={stored} in diffusers"
    known = isinstance(said, str) and said.startswith(expected) and len(said) <= LONGEST_NOTE
    return [Finding("clip_skip", [], 1, note=printable(str(said)) if known else expected)]


def _verify_single(path: Path, facts: Mapping[str, Any], base: BaseModel | None) -> list[Finding]:
    """Check a single file: its edited weights against the provenance, all others against the base model."""
    edited, recorded = _names(facts, path), _mapping(facts, "weights_sha256", path)
    file = SingleFile(path)
    findings = [_compare("edited weights", weights_sha256({name: file.read(name) for name in edited}), recorded)]
    if base is not None:
        values = base.values(_dtype(facts, "base_dtype", path))
        wrong = file.differing((name, value) for name, value in values if name not in edited)
        known = [name for name in base.weight_names() if name.partition(".")[0] in file.parts and name not in edited]
        unedited = Finding("unedited weights", [f"{name} is not that of the base model" for name in wrong], len(known))
        findings += [_base_hashes(facts, base, path), unedited]
    return findings


def _verify_folder(folder: Path, base: BaseModel | None) -> list[Finding]:
    facts = read_provenance(folder)
    edited, recorded = _names(facts, folder), _mapping(facts, "weights_sha256", folder)
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink()]
    findings = [_files(folder, _mapping(facts, "files", folder), links)]
    if links:
        return findings  # files outside the export that links point to are not read
    try:
        weights = WholeModel.in_folder(folder)
    except ValueError as error:
        return [*findings, Finding("weights", [str(error)], 1)]
    names = set(weights.names())
    present = {name: weights[name] for name in edited if name in names}
    findings.append(_compare("edited weights", weights_sha256(present), recorded))
    if base is not None:
        dtypes = _dtype(facts, "base_dtype", folder), _dtype(facts, "dtype", folder)
        unedited = _unedited(weights, base, set(edited), *dtypes)
        findings += [_base_hashes(facts, base, folder), unedited]  # the pass over the weights has hashed them
        if "kept" in facts:
            findings.append(_kept(folder, facts, base, weights.names()))
    return [*findings, *_drawing(facts, base)]


def _files(folder: Path, listed: dict[str, str], links: list[Path]) -> Finding:
    """Compare the files of an export with their list; hidden files, such as git's, are ignored."""
    wrong = [f"{path.relative_to(folder).as_posix()} is a symbolic link" for path in links]
    outside = [name for name in listed if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    wrong += [f"{name} lies outside of the export" for name in outside]
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and path not in links and not hidden and parts != (PROVENANCE,):
            found["/".join(parts)] = file_sha256(path)
    wrong += [f"{name} may hold code" for name in found if PurePosixPath(name).suffix not in {*ENDINGS, ""}]
    result = _compare("files", found, {name: sha256 for name, sha256 in listed.items() if name not in outside})
    return Finding("files", wrong + result.wrong, len(listed))


def read_provenance(folder: Path) -> dict[str, Any]:
    """``provenance.json`` of an export.

    Raises:
        ValueError: The file cannot be read, or is not a JSON object.
    """
    path = folder / PROVENANCE
    try:
        if path.stat().st_size > MAX_PROVENANCE:
            raise ValueError("too large")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt ({error!s:.100}): the export cannot be checked.") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is corrupt (no mapping): the export cannot be checked.")
    return facts


def _mapping(facts: Mapping[str, Any], name: str, path: Path) -> dict[str, str]:
    value = facts.get(name)
    if not isinstance(value, dict) or not all(isinstance(sha256, str) for sha256 in value.values()):
        raise ValueError(f"{path} has no provenance with {name!r}: export it again with this version.")
    return dict(value)


def _names(facts: Mapping[str, Any], path: Path) -> list[str]:
    names = facts.get("edited_weights")
    if not isinstance(names, list) or not all(isinstance(name, str) and WEIGHT_NAME.fullmatch(name) for name in names):
        raise ValueError(f"{path} has no provenance with the names of the edited weights.")
    return names


def _dtype(facts: Mapping[str, Any], name: str, path: Path) -> torch.dtype:
    dtype = getattr(torch, str(facts.get(name)), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path} has no provenance with {name!r}: export it again with this version.")
    return dtype


def _compare(what: str, found: Mapping[str, str], recorded: Mapping[str, str]) -> Finding:
    wrong = [f"{name} is missing" for name in recorded if name not in found]
    wrong += [f"{name} has changed" for name in recorded if name in found and found[name] != recorded[name]]
    wrong += [f"unexpected {name}" for name in found if name not in recorded]
    return Finding(what, wrong, len(recorded))


def _base_hashes(facts: Mapping[str, Any], base: BaseModel, path: Path) -> Finding:
    recorded = _mapping(facts, "base_sha256", path)
    found = base.sha256(_dtype(facts, "base_dtype", path))
    name = str(facts.get("base_model"))
    wrong = [f"{part} is not that of {name:.100}" for part, sha256 in found.items() if recorded.get(part) != sha256]
    return Finding("base model", wrong, len(found))


def _unedited(
    weights: WholeModel, base: BaseModel, edited: set[str], base_dtype: torch.dtype, dtype: torch.dtype
) -> Finding:
    names, reasons = set(weights.names()), {}
    for name, value in base.values(base_dtype):
        if name not in names:
            reasons[name] = "is missing"
        elif name not in edited and not _same(weights[name], value.to(dtype)):
            reasons[name] = "is not that of the base model"
    expected = [name for name in base.weight_names() if name not in edited]
    wrong = [f"{name} is not in the base model" for name in sorted(names - set(expected) - edited)]
    wrong += [f"{name} {reasons[name]}" for name in expected if name in reasons]
    return Finding("unedited weights", wrong, len(expected))


def _kept(folder: Path, facts: Mapping[str, Any], base: BaseModel, names: list[str]) -> Finding:
    """Compare the parts that were copied from the base, such as a safety checker, with the base."""
    kept, listed = kept_of(base, names), facts["kept"]
    if not isinstance(listed, list):
        raise ValueError(f"{folder} has no provenance with the files that are the base's own.")
    places = places_of(None, base, str(facts.get("base_model")))
    try:
        index = dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return Finding("taken over from the base", [f"{INDEX} cannot be read"], 1)
    wrong = [f"{part} is not that of the base model" for part, entry in kept.index.items() if index.get(part) != entry]
    for name, source in kept.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif name in listed and not _same_file(path, source, name, places):
            wrong.append(f"{name} is not that of the base model")
    return Finding("taken over from the base", wrong, len(kept.index) + len(kept.files))


def _same_file(path: Path, source: Path, name: str, places: Places) -> bool:
    public = public_content(source, name, places)
    if file_sha256(path) == file_sha256(source) if public is None else path.read_bytes() == public:
        return True
    return path.suffix in TEXTS and (text := without_any(path)) is not None and text == without_any(source)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(value.cpu().contiguous().flatten().view(torch.uint8) for value in (a, b)))
