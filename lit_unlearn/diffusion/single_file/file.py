"""Reads checkpoints that are one file of safetensors in the layout of the original code, by diffusers' names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lit_unlearn.diffusion.single_file.layout import Layout, Place
from lit_unlearn.diffusion.source import GGUF, PICKLES, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that an edit can be written in, by their names in safetensors."""
QUANTISED = {
    "quant_state.bitsandbytes__nf4": "nf4 of bitsandbytes",
    "quant_state.bitsandbytes__fp4": "fp4 of bitsandbytes",
    ".absmax": "bitsandbytes",
    ".SCB": "int8 of bitsandbytes",
    ".qweight": "whole numbers with scales",
    "scaled_fp8": "fp8 with scales",
    ".scale_weight": "fp8 with scales",
    ".weight_scale": "fp8 with scales",
    ".comfy_quant": "whole numbers with scales",
}
"""Ends of names that only quantised files have, with what they mean."""


class SingleFile:
    """A checkpoint that is one file of safetensors in the layout of the original code; only its header is read.

    Args:
        path: The file.
        field: The option that it was given for, for messages.

    Attributes:
        header: The header, as JSON has it, without the metadata.
        order: Names in the order of the header.
        metadata: What the file says of itself.
        layout: Its parts and the places of their weights.

    Raises:
        ValueError: The file is missing, corrupt, or of another kind; the message says of which.
    """

    def __init__(self, path: str | os.PathLike[str], field: str = "single_file") -> None:
        self.path = Path(path)
        self._check_kind(f"{field}={self.path}")
        read_header(self.path)  # checks it against the length of the file
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content: dict[str, Any] = json.loads(file.read(length))
        self.data_start = 8 + length
        self.order = list(content)
        self.metadata: dict[str, str] = content.pop("__metadata__", None) or {}
        self.header = content
        self._check_quantised(f"{field}={self.path}")
        self.layout = Layout({key: tuple(entry["shape"]) for key, entry in content.items()}, str(self.path))

    def _check_kind(self, given: str) -> None:
        if self.path.is_dir():
            raise ValueError(f"{given} is a folder: give one file of safetensors.")
        if not self.path.is_file():
            raise ValueError(f"{given} does not exist: give the checkpoint that the edit goes into.")
        if self.path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{given} is a pickle, which may hold code: convert it first, with `lit-unlearn convert "
                f"{self.path.name} -o {self.path.stem}.safetensors`."
            )
        with self.path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise ValueError(f"{given} {GGUF}.")

    def _check_quantised(self, given: str) -> None:
        for key in self.header:
            if how := next((how for end, how in QUANTISED.items() if key.endswith(end)), None):
                raise ValueError(
                    f"{given} is quantised ({how}, by its tensor {key!r:.100}), which is too coarse for an edit: give "
                    "the checkpoint in float16, bfloat16 or float32 that it was made of."
                )

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that the file holds, as diffusers has them."""
        return self.layout.parts

    def place(self, name: str) -> Place:
        """As ``Layout.place``."""
        return self.layout.place(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the weight ``name`` is stored.

        Raises:
            ValueError: As ``place``; or the weight is quantised.
        """
        return self.dtype_of(self.place(name).key)

    def dtype_of(self, key: str) -> torch.dtype:
        """The type of the tensor ``key``.

        Raises:
            ValueError: It is quantised.
        """
        kind = self.header[key]["dtype"]
        if kind not in DTYPES:
            raise ValueError(
                f"{self.path} has {key!r} as {kind}, which is too coarse for an edit: give the checkpoint in float16, "
                "bfloat16 or float32."
            )
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """The weight ``name`` of diffusers, in the file's type and diffusers' shape.

        Raises:
            ValueError: As ``dtype``.
        """
        with safe_open(self.path, framework="pt") as file:
            return self._read(file, name)

    def _read(self, file: Any, name: str) -> Tensor:
        if (width := self.layout.identity(name)) is not None:
            return torch.eye(width)
        place, _ = self.place(name), self.dtype(name)  # refuses types that are not read
        if not place.shape:
            return file.get_tensor(place.key)
        stored = file.get_slice(place.key)
        value = torch.cat([stored[start:stop] for start, stop in place.rows])
        return value.T.contiguous() if place.transposed else value.reshape(place.shape)

    def differing(self, values: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the weights that are not those of this file; weights of parts that it does not hold are left out.

        A model is published in several types. Weights count as equal if they are in the type of the file, or if both
        are in half precision.

        Args:
            values: Weights by name in diffusers, of any floating-point type.
        """
        found = []
        with safe_open(self.path, framework="pt") as file:
            for name, value in values:
                if name.partition(".")[0] not in self.parts:
                    continue
                try:
                    stored = self._read(file, name)
                except ValueError:  # the model has more weights, or other layers
                    found.append(name)
                    continue
                types = (stored.dtype, torch.float16, torch.bfloat16)
                if stored.shape != value.shape or not any(torch.equal(stored.to(t), value.to(t)) for t in types):
                    found.append(name)
        return found
