"""Exports of an edit: a diffusers folder, or the changed weights alone, each with where it came from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lit_unlearn import __version__
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.stored import rename_weights
from lit_unlearn.edits.checkpoint import Edit
from lit_unlearn.edits.lora import low_rank
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.system.files import atomic_write, replaced_folder
from lit_unlearn.system.json_files import write_json

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors")
ENDINGS = (".safetensors", ".json", ".md", ".png", ".txt")
"""Endings of the files of an export; ``txt`` is for the merges of a tokenizer. LICENSE and NOTICE have none."""


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, and to overwrite what is no export.

    A symbolic link is refused even with ``overwrite``: what it points to is not what was named. Links among the parent
    folders are followed, since that is where many people's storage lies.

    Raises:
        ValueError: What is in the way.
    """
    if output.is_symlink():
        raise ValueError(f"output={output} is a symbolic link, which an export does not follow: name the place itself.")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
    if output.is_dir() and not (output / PROVENANCE).is_file():
        raise ValueError(f"output={output} is a folder but no export of lit-unlearn: remove it yourself if it may go.")


def provenance(edit: Edit, base: BaseModel, loaded: Pipeline | None = None) -> dict[str, Any]:
    """Where an edit came from, as plain values; its scores, too, if its run was tested.

    Args:
        edit: The edit.
        base: Its base model.
        loaded: The base model's pipeline in the type in which it was edited, if it is loaded and not edited.

    Raises:
        ValueError: The edit changes nothing, the base model is another than that of the edit, or the run's
            ``scores.json`` cannot be read.
    """
    edit.check_weights()
    edit.check_whole(base, loaded)
    base_sha256 = base.sha256(edit.dtype, loaded)
    scores = None
    if edit.run_folder is not None and (edit.run_folder / "scores.json").exists():
        scores = Scores.load(edit.run_folder / "scores.json").to_dict()
        scores.pop("edit")  # the spectra of all layers
    return {
        "method": edit.method,
        "concepts": edit.concepts,
        "base_model": base.name,
        "base_revision": base.revision,
        "base_commit": base.commit,
        "base_dtype": str(edit.dtype).removeprefix("torch."),
        "base_sha256": base_sha256,
        "base_fingerprint": edit.base_fingerprint,
        "edited_weights": list(edit.weights),
        "config": edit.hyper_parameters,
        "edit": edit.edit,
        "recipe": edit.recipe,
        "concept_set": edit.concept_set,
        "concept_set_sha256": edit.concept_set_sha256 or _concept_set_sha256(edit, scores),
        "scores": scores,
        "lit_unlearn": __version__,
        "packages": {name: version(name) for name in PACKAGES},
    }


def _concept_set_sha256(edit: Edit, scores: dict[str, Any] | None) -> str | None:
    """Of a run that did not keep it: the set that it was tested with, else the one that has its name now."""
    if scores is not None:
        return scores["concepts"]["sha256"]
    name = edit.hyper_parameters.get("concept_set")
    if not isinstance(name, str):
        return None
    try:
        return load_concept_set(name).sha256
    except ValueError:  # a file that is gone: the edit is none the worse
        return None


def weights_sha256(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each weight, of its name, shape, type and values."""
    return {name: fingerprint({name: value}) for name, value in weights.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def export_delta(edit: Edit, facts: dict[str, Any], output: Path, dtype: torch.dtype | None) -> None:
    """Write the changed weights (their new values, not differences) as safetensors, ``facts`` as metadata in JSON."""
    weights = {name: value.to(dtype or value.dtype).contiguous() for name, value in edit.weights.items()}
    _write_weights(weights, {"kind": "delta", **facts}, output)


def export_lora(
    edit: Edit,
    facts: dict[str, Any],
    base: BaseModel,
    output: Path,
    rank: int | None,
    dtype: torch.dtype | None,
    old_names: bool = False,
) -> dict[str, Any]:
    """Write the edit as LoRA weights (``low_rank``), ``facts`` as metadata; return its rank and residuals.

    Raises:
        ValueError: The edit changes weights that LoRA cannot hold.
    """
    before = base.weights(edit.weights, edit.dtype)
    assert before is not None  # ``provenance`` has hashed them
    factors, report = low_rank(edit.weights, before, rank, dtype or edit.dtype, old_names)
    _write_weights(factors, {"kind": "lora", **facts, "lora": report}, output)
    return report


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
) -> None:
    """Write the edited pipeline as a diffusers folder with ``provenance.json`` and a model card.

    Args:
        edit: The edit.
        base: Its base model.
        output: Folder to write.
        dtype: Type of the weights; that of the run by default.
        old_names: Put ``text_model.`` before the weights of the text encoder, as transformers 4 names them.

    Raises:
        WriteError: The folder cannot be written; what was there is unchanged.
        ValueError: The model cannot be loaded, or the edit does not fit it.
    """
    edit.check_weights()
    pipeline = base.load(edit.dtype)
    facts = {"kind": "pipeline", **provenance(edit, base, pipeline)}
    edit.apply(pipeline, base)
    for module in pipeline.parts.values():
        module.to(dtype=dtype)
    parameters = pipeline.named_parameters()
    facts["dtype"] = str(dtype or edit.dtype).removeprefix("torch.")
    facts["weights_sha256"] = weights_sha256({name: parameters[name] for name in edit.weights})
    if output.exists():
        _copy_into_memory(pipeline)
    with replaced_folder(output) as folder:
        pipeline.save(folder)
        if old_names:
            rename_weights(folder)
        (folder / "README.md").write_text(model_card(facts, output.name), encoding="utf-8")
        if isinstance(base.place, Path):
            for pattern in ("LICENSE*", "NOTICE*"):
                for file in base.place.glob(pattern):
                    if file.is_file() and not file.is_symlink():  # a link could publish any file of this machine
                        shutil.copyfile(file, folder / file.name)  # not its mode, which may forbid to replace it
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        facts["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_json(folder / PROVENANCE, facts)
        mode = (folder / PROVENANCE).stat().st_mode  # safetensors makes files that only their owner can read
        for file in folder.rglob("*.safetensors"):
            file.chmod(mode)


def _copy_into_memory(pipeline: Pipeline) -> None:
    """Let go of the files that the weights are mapped from: the export may replace them, if it replaces its base."""
    for module in pipeline.parts.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()


def model_card(facts: dict[str, Any], name: str) -> str:
    """Return the README of an export, for people and for the hub."""
    concepts = ", ".join(facts["concepts"])
    removed = f"the concept {concepts} was removed" if concepts else "training pictures were unlearned"
    base = f"base_model: {facts['base_model']}\n" if facts["base_model"].count("/") == 1 else ""
    scores = facts["scores"]
    table = "Not measured.\n"
    if scores:
        before = scores["before"] or {}
        rows = [
            f"| {label} | {_number(before.get(key))} | {_number(scores[key])} |"
            for key, label in (("forget", "forget"), ("retain", "retain"), ("harmonic_mean", "harmonic mean"))
        ]
        table = "\n".join(["| | before | after |", "| --- | ---: | ---: |", *rows]) + (
            f"\n\nJudge {scores['judge']}, concept set {scores['concepts']['name']}, "
            f"{scores['images_per_concept']} pictures per concept.\n"
        )
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-unlearning, lit-unlearn]
{base}---
# {name}: {facts["base_model"]} without {concepts or "some training pictures"}

A text-to-image model from which {removed} with lit-unlearn {facts["lit_unlearn"]}
({facts["method"]}). {len(facts["edited_weights"])} weights differ from those of the base model, whose licence applies.
Removal is not perfect, and what was not tested may have changed: see the scores.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
pipeline("a picture of a castle").images[0].save("castle.png")
```

## Scores

Forget: share of the pictures for prompts of the removed concept that do not show it. Retain: share of the pictures for
other concepts' prompts that show theirs.

{table}
`{PROVENANCE}` has everything needed to make this again.
"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
