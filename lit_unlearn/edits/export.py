"""Exports of an edit: a diffusers folder, or only the changed weights; each with its provenance."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from lit_unlearn import __version__
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import how_to_draw
from lit_unlearn.diffusion.kept import INDEX, PROVENANCE, Kept, kept_of
from lit_unlearn.diffusion.lora_names import LoraNames, Naming
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.provenance import PROVENANCE as SINGLE
from lit_unlearn.diffusion.public_name import public_name
from lit_unlearn.diffusion.stored import rename_weights
from lit_unlearn.edits.card import model_card
from lit_unlearn.edits.chain import left_by, name_of
from lit_unlearn.edits.checkpoint import Edit
from lit_unlearn.edits.lora import Rank, low_rank
from lit_unlearn.edits.public import Places, public_content
from lit_unlearn.edits.single_file import SingleFile, Written, write_edits
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.system.files import atomic_write, replaced_folder
from lit_unlearn.system.json_files import write_json

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors")
FILE_ENDINGS = (
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".onnx", ".gguf", ".msgpack", ".h5", ".npz", ".npy"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".json", ".jsonl", ".yaml", ".yml", ".toml"),
    *(".txt", ".md", ".csv", ".html", ".pdf", ".py", ".png", ".jpg", ".jpeg", ".webp"),
)
"""Endings of file names; other dots are allowed in a folder's name, as in ``v1.5`` or ``sd-1.4-without-dog``."""


def output_path(output: Path, file_name: str | None, overwrite: bool) -> Path:
    """The path that an export is written to, checked before anything is read.

    Args:
        output: The path that the user gave.
        file_name: Name of the file to write if ``output`` is a folder; None if the export itself is a folder.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        ValueError: The name does not fit the kind of export, or the output exists and may not be replaced.
    """
    named = f"output={str(output)!r}"
    if file_name is None and output.suffix.lower() in FILE_ENDINGS:
        one = " (--delta and --lora RANK write one .safetensors file)" if output.suffix == ".safetensors" else ""
        raise ValueError(f"{named} is the name of a file, and a pipeline is written as a folder: name a folder{one}.")
    if file_name is not None and output.suffix != ".safetensors":
        if output.suffix.lower() in FILE_ENDINGS:
            raise ValueError(f"{named}: weights are written as .safetensors: name such a file, or a folder.")
        if output.is_file():
            raise ValueError(f"{named} is a file: name a folder, or a file that ends with .safetensors.")
        if output.is_symlink():
            check_output(output, overwrite)
        output = output / file_name
    if file := next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f"{named}: {str(file)!r} is a file where a folder should be, so name another folder.")
    check_output(output, overwrite)
    return output


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists; with ``overwrite`` refuse it only if it is not an export.

    A symbolic link is refused even with ``overwrite``, because it points to a place that the user did not name. Links
    among the parent folders are followed, since many people's storage is reached through them.

    Raises:
        ValueError: The output cannot be written there; the message says why.
    """
    if output.is_symlink():
        raise ValueError(f"output={output} is a symbolic link, which an export does not follow: name the place itself.")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
    kind = "folder" if output.is_dir() else "file"
    if (kind == "folder") == (output.suffix == ".safetensors"):
        raise ValueError(f"output={output} is a {kind}, and something else would be written: choose another name.")
    if not (output / PROVENANCE).is_file() and not _is_exported_file(output):
        raise ValueError(f"output={output} is a {kind} but no export of lit-unlearn: remove it yourself if it may go.")


def _is_exported_file(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return "lit_unlearn" in metadata or f"{SINGLE}lit_unlearn" in metadata
    except (OSError, SafetensorError):
        return False


def provenance(edit: Edit, base: BaseModel, loaded: Pipeline | None = None) -> dict[str, Any]:
    """The provenance of an edit as plain values, with its scores if its run was tested.

    It contains no path of this machine: the base model has its public name, and a setting that is a path is replaced by
    the name of its file or folder. ``local_paths`` lists these settings.

    Args:
        edit: The edit.
        base: Its base model.
        loaded: The base model's pipeline in the dtype in which it was edited, if it is loaded and not edited.

    Raises:
        ValueError: The edit changes nothing, the edit was made on another base model, or the run's ``scores.json``
            cannot be read.
    """
    edit.check_weights()
    edit.check_whole(base, loaded)
    base_sha256 = base.sha256(edit.dtype, loaded)
    scores = None
    if edit.run_folder is not None and (edit.run_folder / "scores.json").exists():
        scores = Scores.load(edit.run_folder / "scores.json").to_dict()
        scores.pop("edit")  # the spectra of all layers
    name, revision = public_name(base, base_sha256)
    facts: dict[str, Any] = {
        "method": edit.method,
        "concepts": edit.concepts,
        "base_model": name,
        "base_revision": revision,
        "base_commit": base.commit or (revision if isinstance(base.place, Path) else None),
        "base_dtype": str(edit.dtype).removeprefix("torch."),
        "base_sha256": base_sha256,
        "base_fingerprint": edit.base_fingerprint,
        "edited_weights": list(edit.weights),
        "concept_set": edit.concept_set,
        "concept_set_sha256": edit.concept_set_sha256 or _concept_set_sha256(edit, scores),
        "lit_unlearn": __version__,
        "version": edit.version,
        "packages": {name: version(name) for name in PACKAGES},
    }
    made = {"config": edit.hyper_parameters, "edit": edit.edit, "recipe": edit.recipe, "scores": scores}
    if how := how_to_draw(base.family, edit.clip_skip, base.names):
        facts |= {"clip_skip": edit.clip_skip, "drawing": how}
    chain = {"chain": [link.stored() for link in edit.chain]} if edit.chain else {}
    places, changed = places_of(edit, base, name), list[str]()
    places.learn({**made, **chain})
    facts |= places.without({**made, **chain}, changed)
    if revision and isinstance(base.place, Path):  # its name so far is the path of that commit
        for settings in (facts["config"], ((facts["recipe"] or {}).get("model") or {}).get("init_args") or {}):
            settings["revision"] = revision
    return {**facts, "local_paths": changed}


def places_of(edit: Edit | None, base: BaseModel, name: str) -> Places:
    """A ``Places`` that replaces the paths of the base model by its public ``name``."""
    given = [base.name, str(base.place), *([edit.model] if edit is not None else [])]
    return Places({text: name for path in given for text in (path, os.path.abspath(path), os.path.realpath(path))})


def _concept_set_sha256(edit: Edit, scores: dict[str, Any] | None) -> str | None:
    """Hash of the concept set of a run that did not store it: from its test, else of the set with that name now."""
    if scores is not None:
        return scores["concepts"]["sha256"]
    name = edit.hyper_parameters.get("concept_set")
    if not isinstance(name, str):
        return None
    try:
        return load_concept_set(name).sha256
    except ValueError:  # the file of the set is gone; the export works without its hash
        return None


def weights_sha256(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each weight: its name, shape, type and values are hashed."""
    return {name: fingerprint({name: value}) for name, value in weights.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def export_delta(edit: Edit, facts: dict[str, Any], output: Path, dtype: torch.dtype | None) -> None:
    """Write the changed weights (new values, not differences) as safetensors, and ``facts`` as JSON metadata.

    Of edits on top of edits, values that a later one has replaced follow, with names that begin with ``overwritten.``.

    Raises:
        ValueError: ``dtype`` cannot hold a weight.
    """
    replaced = {name_of(key): value for key, value in edit.overwritten.items()}
    values = {**edit.weights, **replaced}
    weights = {name: value.to(dtype or value.dtype).contiguous() for name, value in values.items()}
    _check_finite(weights, dtype)
    if edit.chain:  # the hashes are those of the values as they are written
        old = {key: weights[name_of(key)] for key in edit.overwritten}
        hashes = map(fingerprint, left_by(edit.chain, weights, old))
        links = [{**link, "sha256": sha256} for link, sha256 in zip(facts["chain"], hashes, strict=True)]
        facts = {**facts, "chain": links}
    _write_weights(weights, {"kind": "delta", **facts}, output)


def export_lora(
    edit: Edit,
    facts: dict[str, Any],
    base: BaseModel,
    output: Path,
    rank: Rank,
    dtype: torch.dtype | None,
    naming: Naming = "kohya",
) -> dict[str, Any]:
    """Write the edit as LoRA weights (``low_rank``), with ``facts`` as metadata; return its rank and residuals.

    Raises:
        ValueError: The edit changes weights that diffusers does not read as LoRA, or ``dtype`` cannot hold the factors;
            or diffusers reads no LoRA weights for the family.
    """
    if not (family := base.family).loads_lora:
        raise ValueError(
            f"lora: diffusers reads no LoRA weights for {family.title} ({family.index_class}): use --delta, or export "
            "the folder."
        )
    before = base.weights(edit.weights, edit.dtype)
    assert before is not None  # ``provenance`` has hashed them
    names = LoraNames.of(naming, {name.partition(".")[0] for name in base.weight_names()})
    factors, report = low_rank(edit.weights, before, rank, dtype or edit.dtype, names)
    _check_finite(factors, dtype)
    _write_weights(factors, {"kind": "lora", **facts, "lora": report}, output)
    return report


def export_single(
    edit: Edit, facts: dict[str, Any], base: BaseModel, source: SingleFile, output: Path, overwrite: bool
) -> Written:
    """Write the edit into a copy of a single file, in the file's own types, with ``facts`` in its metadata.

    Raises:
        ValueError: The file is not of the base model; or as ``write_edits``.
    """
    is_base = base.single_file is not None and source.path.samefile(base.single_file)
    if other := [] if is_base else source.differing(base.values(edit.dtype)):
        parts = " and ".join(dict.fromkeys(name.partition(".")[0] for name in other))
        raise ValueError(
            f"single_file={source.path} differs from model={base.name!r} in {parts} ({other[0]}"
            f"{f' and {len(other) - 1} more' if len(other) > 1 else ''}): give the file of the model that was edited."
        )
    weights = {name: value.to(source.dtype(name)) for name, value in edit.weights.items()}
    facts = {"kind": "single", **facts, "weights_sha256": weights_sha256(weights)}
    metadata = {name: json.dumps(value, default=str) for name, value in facts.items()}
    return write_edits(source, edit.weights, output, metadata, overwrite)


def _check_finite(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse what a narrower type has made of weights that are too large for it; they were finite before."""
    for name, value in weights.items() if dtype is not None else ():
        if not value.isfinite().all():
            raise ValueError(
                f"dtype={str(dtype).removeprefix('torch.')} cannot hold {name}, whose numbers are too large for"
                " it: export as bfloat16 or float32."
            )


def _write_weights(weights: Mapping[str, Tensor], facts: dict[str, Any], output: Path) -> None:
    facts = {**facts, "weights_sha256": weights_sha256(weights)}
    metadata = {"format": "pt", **{name: json.dumps(value, default=str) for name, value in facts.items()}}
    with atomic_write(output) as file:
        file.write(serialize(dict(weights), metadata))


def export_pipeline(
    edit: Edit,
    base: BaseModel,
    output: Path,
    dtype: torch.dtype | None,
    old_names: bool = False,
) -> Kept:
    """Write the edited pipeline as a diffusers folder with ``provenance.json`` and a model card.

    Args:
        edit: The edit.
        base: Its base model.
        output: Folder to write.
        dtype: Type of the weights; None takes the run's.
        old_names: Put ``text_model.`` before the names of the text encoder's weights, as transformers 4 does.

    Returns:
        The files and parts that are copied from the base, and the ones that are left out.

    Raises:
        WriteError: The folder cannot be written; its earlier content is unchanged.
        ValueError: The model cannot be loaded, the edit does not fit it, or ``dtype`` cannot hold a weight.
    """
    edit.check_weights()
    pipeline = base.load(edit.dtype)
    facts = {"kind": "pipeline", **provenance(edit, base, pipeline)}
    edit.apply(pipeline, base)
    for module in pipeline.parts.values() if dtype is not None else ():
        torch.nn.Module.to(module, dtype=dtype)  # diffusers' own warns about float32 layers without need
    parameters = pipeline.named_parameters()
    _check_finite(parameters, dtype)
    facts["dtype"] = str(dtype or edit.dtype).removeprefix("torch.")
    facts["weights_sha256"] = weights_sha256({name: parameters[name] for name in edit.weights})
    kept = kept_of(base, parameters)
    places = places_of(edit, base, facts["base_model"])
    if output.exists():
        _copy_into_memory(pipeline)
    with replaced_folder(output) as folder:
        pipeline.save(folder)
        if old_names:
            rename_weights(folder)
        facts["kept"], facts["left_out"] = _keep(kept, folder), kept.left_out
        (folder / "README.md").write_text(model_card(facts, " ".join(output.name.split())), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        make_public(folder, places)
        facts["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_json(folder / PROVENANCE, facts)
        mode = (folder / PROVENANCE).stat().st_mode  # files of safetensors can be read by their owner only
        for file in folder.rglob("*.safetensors"):
            file.chmod(mode)
    return kept


def _keep(kept: Kept, folder: Path) -> list[str]:
    """Copy the files that an export takes over from the base, except files that exist already; return their names."""
    names = [name for name in kept.files if not (folder / name).exists()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept.files[name], folder / name)  # without its mode, which may be read-only
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    write_json(folder / INDEX, {**index, **kept.index})
    return names


def make_public(folder: Path, places: Places) -> None:
    """Replace the paths of this machine in the files of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (public := public_content(path, path.relative_to(folder).as_posix(), places)) is not None:
            path.write_bytes(public)


def _copy_into_memory(pipeline: Pipeline) -> None:
    """Copy weights that are mapped from files into memory: the export may replace these files."""
    for module in pipeline.parts.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
