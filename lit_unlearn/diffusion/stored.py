"""Reads the weights of a model by name, one at a time from its files, to hash and compare them without the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.source import is_pointer, weight_files

WEIGHTED_PARTS = ("text_encoder", "unet", "vae")

OLD_PREFIX = {"text_encoder": "text_model."}
"""Prefix of the names of a part's weights in 2022, which some tools still expect."""

# Tensors in files that transformers ignores: position ids of 2022, and the other half of a whole CLIP.
CLIP_REST = r"text_projection\.weight|visual_projection\.weight|logit_scale|vision_model\..+"
NO_WEIGHTS = {
    "text_encoder": re.compile(rf".*\bposition_ids|{CLIP_REST}"),
    "unet": re.compile("$^"),
    "vae": re.compile("$^"),
}

# Names that diffusers changes when it loads an autoencoder of 2022.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def parameter_name(part: str, stored: str) -> str:
    """The name that the parameter ``stored`` in a file of ``part`` has in the loaded model."""
    if part == "text_encoder":
        return stored.removeprefix("text_model.")
    if part == "vae":
        for old, new in OLD_ATTENTION.items():
            stored = stored.replace(old, new)
    return stored


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


class StoredWeights(Mapping[str, Tensor]):
    """Parameters of one part of a model folder; each is read when it is used.

    Args:
        folder: The model.
        part: ``text_encoder``, ``unet`` or ``vae``.
        dtype: Type of the returned tensors; None keeps the stored type.

    Attributes:
        described: The entry of each parameter in the headers of the files.

    Raises:
        ValueError: A file is corrupt.
    """

    def __init__(self, folder: Path, part: str, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.described: dict[str, StoredTensor] = {}
        for file in weight_files(folder, part):
            for stored, (kind, shape) in read_header(file).items():
                if NO_WEIGHTS[part].fullmatch(stored):
                    continue
                name = parameter_name(part, stored)
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


@dataclass(frozen=True)
class WholeModel:
    """All weights of a model.

    Attributes:
        parts: ``text_encoder``, ``unet`` and ``vae``, each its parameters by name within the part.
    """

    parts: dict[str, Mapping[str, Tensor]]

    @classmethod
    def loaded(cls, pipeline: Pipeline) -> WholeModel:
        """The weights of a loaded pipeline, not copied."""
        parts: dict[str, Mapping[str, Tensor]] = {
            part: dict(module.named_parameters()) for part, module in pipeline.parts.items()
        }
        return cls(parts)

    @classmethod
    def in_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> WholeModel:
        """The weights in the files of ``folder``."""
        return cls({part: StoredWeights(folder, part, dtype) for part in WEIGHTED_PARTS})

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
    """Give the weights in ``folder`` the names of 2022, which tools for transformers 4 need."""
    for part, prefix in OLD_PREFIX.items():
        for path in (folder / part).glob("*.safetensors"):
            stored = load(path.read_bytes())  # not mapped, since the file is overwritten
            path.write_bytes(
                save({prefix + name.removeprefix(prefix): v for name, v in stored.items()}, {"format": "pt"})
            )
