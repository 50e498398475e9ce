"""Exports of an edit: a diffusers folder, or the changed weights alone, each with where it came from."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from lit_unlearn import __version__
from lit_unlearn.checkpoint import Edit, load_edited
from lit_unlearn.diffusion.components import resolve_model, save_pipeline
from lit_unlearn.evaluation.files import atomic_write
from lit_unlearn.evaluation.scores import Scores, write_json

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "lightning", "diffusers", "transformers")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, and to overwrite what is no export.

    Raises:
        ValueError: What is in the way.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
    if output.is_dir() and not (output / PROVENANCE).is_file():
        raise ValueError(f"output={output} is a folder but no export of lit-unlearn: remove it yourself if it may go.")


def provenance(edit: Edit, model: str) -> dict[str, Any]:
    """Where an edit came from, as plain values; its scores, too, if its run was tested.

    Raises:
        ValueError: The run's ``scores.json`` cannot be read.
    """
    scores = None
    if edit.run_folder is not None and (edit.run_folder / "scores.json").exists():
        scores = Scores.load(edit.run_folder / "scores.json").to_dict()
        scores.pop("edit")  # the spectra of all layers
    return {
        "method": edit.method,
        "concepts": edit.concepts,
        "base_model": model,
        "base_fingerprint": edit.base_fingerprint,
        "edited_weights": list(edit.weights),
        "config": edit.hyper_parameters,
        "scores": scores,
        "lit_unlearn": __version__,
        "packages": {name: version(name) for name in PACKAGES},
    }


def export_delta(edit: Edit, facts: dict[str, Any], output: Path, dtype: torch.dtype | None) -> None:
    """Write the changed weights (their new values, not differences) as safetensors, ``facts`` as metadata in JSON."""
    weights = {name: value.to(dtype or value.dtype).contiguous() for name, value in edit.weights.items()}
    metadata = {"format": "pt", **{name: json.dumps(value, default=str) for name, value in facts.items()}}
    with atomic_write(output) as file:
        file.write(serialize(weights, metadata))


def export_pipeline(
    edit: Edit, facts: dict[str, Any], model: str, output: Path, dtype: torch.dtype | None, revision: str | None
) -> None:
    """Write the edited pipeline as a diffusers folder with ``provenance.json`` and a model card.

    Raises:
        OSError: The folder cannot be written; what was there is unchanged.
        ValueError: The model cannot be loaded, or the edit does not fit it.
    """
    components = load_edited(model, edit, revision)
    for module in components.modules().values():
        module.to(dtype=dtype)
    with replaced_folder(output) as folder:
        save_pipeline(components, folder)
        write_json(folder / PROVENANCE, facts)
        (folder / "README.md").write_text(model_card(facts, output.name), encoding="utf-8")
        base = resolve_model(model)
        if isinstance(base, Path):
            for pattern in ("LICENSE*", "NOTICE*"):
                for file in base.glob(pattern):
                    shutil.copy(file, folder)
        mode = (folder / PROVENANCE).stat().st_mode  # safetensors makes files that only their owner can read
        for file in folder.rglob("*.safetensors"):
            file.chmod(mode)


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``output``; when the block ends it takes the place of ``output``, or nothing does.

    Raises:
        OSError: A file cannot be written; the message names the output.
    """
    token = secrets.token_hex(4)
    temporary, old = (output.with_name(f".{output.name}.{token}.{suffix}") for suffix in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
    except OSError as error:
        raise OSError(error.errno, f"Could not write {output}: {error.strerror or error}.") from error
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def model_card(facts: dict[str, Any], name: str) -> str:
    """Return the README of an export, for people and for the hub."""
    concepts = ", ".join(facts["concepts"])
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
# {name}: {facts["base_model"]} without {concepts}

A text-to-image model from which the concept {concepts} was removed with lit-unlearn {facts["lit_unlearn"]}
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
