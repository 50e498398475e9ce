"""Reads the weights of a model by name, one at a time from its files, to hash and compare them without the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.parts import KINDS, Kind, described_model, weights_of
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.single_file.file import SingleFile
from lit_unlearn.diffusion.source import ORIGINS, STEMS, read_config, read_header, weight_files, weighted_parts

USUAL = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""Classes of parts if ``model_index.json``, which says so, is broken."""
OLD_PREFIX = "text_model."
"""Prefix of the names of a ``CLIPTextModel``'s weights in 2022, which some tools still expect."""


def _kind(folder: Path, part: str) -> Kind:
    """The class of a part, by ``model_index.json`` if that can be read."""
    try:
        named = weighted_parts(folder)
    except ValueError:
        named = {}
    return KINDS.get(named.get(part, USUAL.get(part, "")), Kind("diffusers"))


class StoredTensor(NamedTuple):
    """A tensor in a file, as described by the file's header.

    Attributes:
        file: The file.
        stored: Its name there.
        dtype: Its type, as named by safetensors: ``F32``, ``BF16``.
        shape: Its shape.
    """

    file: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]


class StoredWeights(Mapping[str, Tensor]):
    """Parameters of one part of a model folder; each is read when it is used.

    Args:
        folder: The model.
        part: A part that holds weights, such as ``unet``.
        dtype: Type of the returned tensors; None keeps the stored type.

    Attributes:
        described: The entry of each parameter in the headers of the files.

    Raises:
        ValueError: A file is corrupt.
    """

    def __init__(self, folder: Path, part: str, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        model = _kind(folder, part)
        self.described: dict[str, StoredTensor] = {}
        for file in weight_files(folder, part):
            for stored, (kind, shape) in read_header(file).items():
                if model.ignored.fullmatch(stored):
                    continue
                name = model.parameter_name(stored)
                if (other := self.described.get(name)) is not None:
                    raise ValueError(
                        f"{file} has {stored!r}, and {other.file.name} has {other.stored!r}, which are the same "
                        "weight: keep one of them."
                    )
                self.described[name] = StoredTensor(file, stored, kind, shape)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.described[name]
        with safe_open(tensor.file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(tensor.stored)
        return value if self.dtype is None else value.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


class FileWeights(StoredWeights):
    """Parameters of one part that a single file holds in the layout of the original code; each is read when it is used.

    Tensors in the file that belong to no weight of the part are in ``described`` by their names there, so that they can
    be refused.

    Args:
        folder: The folder that stands for the file, with the configuration of the part.
        part: A part that the file holds.
        dtype: Type of the returned tensors; None keeps the stored type.

    Raises:
        ValueError: As ``SingleFile``, ``Layout.place`` and ``described_model``.
    """

    def __init__(self, folder: Path, part: str, dtype: torch.dtype | None = None) -> None:
        self.dtype, self.part = dtype, part
        self.file = SingleFile(ORIGINS[folder].file, "model")
        layout, kind = self.file.layout, KINDS[weighted_parts(folder)[part]]
        module = described_model(weighted_parts(folder)[part], read_config(folder / part / "config.json"))
        shapes = {name: tuple(value.shape) for name, value in weights_of(module).items()}
        self.described = {}
        for name, shape in shapes.items():
            if layout.has(f"{part}.{name}"):
                place = layout.place(f"{part}.{name}")
                described = StoredTensor(self.file.path, place.key, self.file.header[place.key]["dtype"], place.shape)
                self.described[name] = described
            elif layout.identity(f"{part}.{name}") is not None:
                self.described[name] = StoredTensor(self.file.path, "", "F32", shape)
        for key in layout.unclaimed(part, [name for name, tensor in self.described.items() if tensor.stored]):
            if not kind.ignored.fullmatch(key):
                entry = self.file.header[layout.prefix(part) + key]
                found = StoredTensor(self.file.path, layout.prefix(part) + key, entry["dtype"], tuple(entry["shape"]))
                self.described[key] = found

    def __getitem__(self, name: str) -> Tensor:
        value = self.file.read(f"{self.part}.{name}")
        return value if self.dtype is None else value.to(self.dtype)


def stored_weights(folder: Path, part: str, dtype: torch.dtype | None = None) -> StoredWeights:
    """The weights of a part: of a folder, or of the single file that it stands for."""
    origin = ORIGINS.get(folder)
    return (FileWeights if origin is not None and part in origin.parts else StoredWeights)(folder, part, dtype)


@dataclass(frozen=True)
class WholeModel:
    """All weights of a model.

    Attributes:
        parts: The parts that hold weights, each its parameters, and buffers that are saved, by name within the part.
    """

    parts: dict[str, Mapping[str, Tensor]]

    @classmethod
    def loaded(cls, pipeline: Pipeline) -> WholeModel:
        """The weights of a loaded pipeline, not copied."""
        return cls({part: weights_of(module) for part, module in pipeline.parts.items()})

    @classmethod
    def in_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> WholeModel:
        """The weights in the files of ``folder``, whatever its ``model_index.json`` says."""
        return cls({part: stored_weights(folder, part, dtype) for part in STEMS if weight_files(folder, part)})

    def __getitem__(self, name: str) -> Tensor:
        part, _, rest = name.partition(".")
        return self.parts[part][rest]

    def names(self) -> list[str]:
        """Full names of all weights."""
        return [f"{part}.{name}" for part, weights in self.parts.items() for name in weights]

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each part: of the names, shapes and values of all its weights, in the type in which they are read.

        The weights are hashed and not the files: other files or the names of 2022 do not change the hash.
        """
        return {part: fingerprint(weights) for part, weights in self.parts.items()}


def rename_weights(folder: Path) -> None:
    """Give the weights of CLIP text encoders in ``folder`` the names of 2022, which tools for transformers 4 need."""
    for part, kind in weighted_parts(folder).items():
        for path in (folder / part).glob("*.safetensors") if kind == "CLIPTextModel" else ():
            stored = load(path.read_bytes())  # not mapped, since the file is overwritten
            names = {name: OLD_PREFIX + name.removeprefix(OLD_PREFIX) for name in stored}
            path.write_bytes(save({names[name]: value for name, value in stored.items()}, {"format": "pt"}))
