"""Edited weights as a run (``.ckpt``) or an export (``.safetensors``) keeps them: read, checked, applied."""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_unlearn.diffusion.components import DiffusionComponents, check_model, load_components, resolve_model
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.evaluation.files import atomic_write

DELTA_FIELDS = ("method", "concepts", "base_model", "base_fingerprint", "config")
"""Fields of a delta's metadata that reading it needs, each JSON text."""


@dataclass(frozen=True)
class Edit:
    """An edit: the weights that it changed, and what they belong to.

    Attributes:
        path: The file.
        method: Name of the class that found it.
        concepts: Names of the edited concepts.
        model: The base model as the run named it: a folder or a hub id.
        base_fingerprint: Hash of the base model's values of the edited weights.
        weights: New values by full parameter name.
        hyper_parameters: Arguments of the method.
    """

    path: Path
    method: str
    concepts: list[str]
    model: str
    base_fingerprint: str
    weights: dict[str, Tensor]
    hyper_parameters: dict[str, Any]

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that the file belongs to, or None."""
        return run_folder(self.path)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the base model was loaded when it was edited."""
        return getattr(torch, self.hyper_parameters.get("dtype", "float32"))

    def check_base(self, model: str) -> None:
        """Refuse a base model that the edit was not made on, reading its edited weights only.

        The weights of a hub id are not at hand; only its name can be compared.

        Raises:
            ValueError: The model is another, or no model folder.
        """
        refusal = (
            f"{self.path} edits {self.model!r} and does not fit model={model!r}, whose weights differ: "
            "use the model that it was made on."
        )
        path = resolve_model(model)
        if isinstance(path, str):
            if model != self.model:
                raise ValueError(refusal)
            return
        check_model(model)
        values = _read_weights(path, list(self.weights))
        if values is None or fingerprint({n: v.to(self.dtype) for n, v in values.items()}) != self.base_fingerprint:
            raise ValueError(refusal)

    @torch.no_grad()
    def apply(self, components: DiffusionComponents) -> None:
        """Write the edited weights into the loaded pipeline.

        Raises:
            ValueError: The pipeline lacks a weight, has it in another shape, or is another than the edit was made on.
        """
        parameters = components.named_parameters()
        for name, value in self.weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(
                    f"{self.path} edits {name} of shape {tuple(value.shape)}, which the model does not have."
                )
        if fingerprint({name: parameters[name] for name in self.weights}) != self.base_fingerprint:
            raise ValueError(f"{self.path} edits {self.model!r}, which has other weights than the loaded model.")
        for name, value in self.weights.items():
            parameters[name].copy_(value)


def run_folder(ckpt_path: str | Path) -> Path | None:
    """Folder of the run that a checkpoint lies in (``RUN/checkpoints/last.ckpt``), or None if it lies elsewhere."""
    parent = Path(ckpt_path).absolute().parent
    return Path(ckpt_path).parent.parent if parent.name == "checkpoints" else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that readers see the old file or the new one, on disk when it returns.

    Lightning's own goes by a temporary file elsewhere, which is copied if that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` to ``path``."""
        with atomic_write(path) as file:
            torch.save(checkpoint, file)


def newest_checkpoint(folder: Path) -> Path | None:
    """The ``last.ckpt`` of the newest run among ``folder/version_N``, or None."""
    found = {path.parts[-3].removeprefix("version_"): path for path in folder.glob("version_*/checkpoints/last.ckpt")}
    versions = [version for version in found if version.isdigit()]
    return found[max(versions, key=int)] if versions else None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of Lightning's, without running code that it may hold.

    Raises:
        ValueError: The file is missing or corrupt.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"ckpt_path={path} is a folder: give the file, e.g. {path / 'checkpoints' / 'last.ckpt'}.")
    if not path.is_file():
        raise ValueError(f"ckpt_path={path} does not exist: `lit-unlearn fit` writes logs/.../checkpoints/last.ckpt.")
    corrupt = f"ckpt_path={path} is corrupt or no checkpoint"
    try:
        # torch does not verify what it reads; the archive has a checksum for each of its members.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{corrupt} ({damaged} is damaged): copy it again, or run the fit again.")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{corrupt} ({reason}): copy it again, or run the fit again.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{corrupt}: it has no state_dict.")
    return checkpoint


def read_edit(path: str | Path) -> Edit:
    """Read the checkpoint of a run, or an exported delta.

    Raises:
        ValueError: The file is missing, corrupt, or not made by lit-unlearn.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_delta(path)
    from lit_unlearn.methods.base import CHECKPOINT_KEY

    checkpoint = load_checkpoint(path)
    state = checkpoint["state_dict"]
    try:
        ours: dict[str, Any] = checkpoint[CHECKPOINT_KEY]
        return Edit(
            path=path,
            method=ours["method"],
            concepts=list(ours["concepts"]),
            model=ours["model"],
            base_fingerprint=ours["base_fingerprint"],
            weights={name: state[name] for name in ours["edited_names"]},
            hyper_parameters={k: v for k, v in checkpoint["hyper_parameters"].items() if k != "_instantiator"},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"ckpt_path={path} was not made by an edit of lit-unlearn: it does not say what it edits."
        ) from error


def _read_delta(path: Path) -> Edit:
    if not path.is_file():
        raise ValueError(f"ckpt_path={path} does not exist: `lit-unlearn export --delta` writes such a file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"ckpt_path={path} is corrupt ({error}): copy it again.") from error
    try:
        method, concepts, model, base_fingerprint, config = (json.loads(metadata[name]) for name in DELTA_FIELDS)
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"ckpt_path={path} was not made by `lit-unlearn export --delta`: it lacks {error}.") from error
    return Edit(path, method, concepts, model, base_fingerprint, weights, config)


def load_edited(model: str, edit: Edit | None, revision: str | None = None) -> DiffusionComponents:
    """Load the pipeline ``model`` and apply ``edit``, if there is one.

    Raises:
        ValueError: The model cannot be loaded, or the edit does not fit it.
    """
    if edit and not edit.weights:
        raise ValueError(f"{edit.path} edits no weight of the model: {edit.method} leaves it as it is.")
    components = load_components(model, edit.dtype if edit else torch.float32, revision)
    if edit:
        edit.apply(components)
    return components


def _read_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Read the parameters ``names`` from the weight files of a model folder; None if one is missing."""
    values: dict[str, Tensor] = {}
    for part in sorted({name.split(".")[0] for name in names}):
        wanted = {name.removeprefix(f"{part}."): name for name in names if name.startswith(f"{part}.")}
        # Files of other variants, such as model.fp16.safetensors, are not what is loaded.
        for file in sorted(path for path in (folder / part).glob("*.safetensors") if len(path.suffixes) == 1):
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 - it is no mapping
                    if (name := stored.removeprefix("text_model.")) in wanted:
                        values[wanted[name]] = tensors.get_tensor(stored)
    return values if len(values) == len(names) else None
