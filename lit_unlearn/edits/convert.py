"""Writes the weights in a checkpoint that is a pickle as safetensors; no code in it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.edits.archives import UNPICKLING_ERRORS, load_pickle
from lit_unlearn.edits.single_file import header_bytes
from lit_unlearn.system.files import atomic_write

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors that are written, with their names in safetensors."""
REFUSED = re.compile(r"GLOBAL ([\w.]+)")
"""How ``torch.load`` names an object that it does not make."""


@dataclass(frozen=True)
class Converted:
    """What was converted.

    Attributes:
        tensors: Number of tensors.
        left_out: Names of the entries that are no tensors, such as the number of the epoch.
    """

    tensors: int
    left_out: list[str]


def convert(source: Path, output: Path) -> Converted:
    """Write the tensors of a pickle as safetensors.

    The pickle is read with ``weights_only=True``, which makes tensors and plain containers and nothing
    else. If the tensors are in an entry ``state_dict``, they are taken from there. Values and types stay.

    Args:
        source: A checkpoint: ``.ckpt``, ``.pt``, ``.pth`` or ``.bin``.
        output: The file to write.

    Raises:
        ValueError: The source is missing, corrupt, holds other objects than tensors (the message names one) or no
            tensors; or the output exists.
        WriteError: The output cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"output={output} exists: choose another name.")
    state, left_out = _state(_load(source), source)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    left_out += [str(name) for name in state if name not in tensors]
    if not tensors:
        raise ValueError(f"{source} holds no tensors: give the checkpoint of a model.")
    _check(tensors, source)
    _write(tensors, output)
    return Converted(len(tensors), left_out)


def _load(source: Path) -> Any:
    if not source.is_file():
        raise ValueError(f"{source} {'is a folder' if source.is_dir() else 'does not exist'}: give a .ckpt file.")
    with source.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"GGUF" or source.suffix.lower() == ".gguf":
        raise ValueError(f"{source} is a GGUF file, whose weights are quantised: give the checkpoint it was made of.")
    if source.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        raise ValueError(f"{source} is a file of safetensors already: use it as it is.")
    try:
        return load_pickle(source)
    except UNPICKLING_ERRORS as error:
        if found := REFUSED.search(str(error)):
            raise ValueError(
                f"{source} holds an object {found[1]}, which is code and no tensor, and is not read for that: get the "
                "model as safetensors, or its weights alone from its author."
            ) from error
        # torch advises to load it with code before it says what is wrong
        told = str(error).partition("WeightsUnpickler error: ")
        reason = (told[2] or told[0]).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source} is corrupt or no checkpoint ({reason:.200}): copy it again.") from error


def _state(content: Any, source: Path) -> tuple[Mapping[Any, Any], list[str]]:
    """The mapping that holds the tensors, and the names of the entries beside it."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source} holds a {type(content).__name__}, no weights by name: give the checkpoint of a model."
        )
    state = content.get("state_dict")
    if not isinstance(state, Mapping):
        return content, []
    return state, [str(name) for name in content if name != "state_dict"]


def _check(tensors: Mapping[Any, Tensor], source: Path) -> None:
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{source} has a tensor under {name!r:.40}, which is no name: give the checkpoint of a model."
            )
        if value.layout != torch.strided or value.dtype not in NAMES:
            kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
            raise ValueError(f"{source} has {name!r:.100} as {kind}, which is not converted: give unquantised weights.")


def _write(tensors: Mapping[str, Tensor], output: Path) -> None:
    """Write tensors one by one, the widest types first, so that each lies where its type wants to lie."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, value in ordered:
        start, end = end, end + value.numel() * value.element_size()
        content[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    with atomic_write(output) as file:
        file.write(header_bytes(content))
        for _, value in ordered:
            file.write(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
