"""Reads weights of a single file by diffusers' names, and writes edits into a copy of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_unlearn.diffusion.provenance import PROVENANCE
from lit_unlearn.diffusion.single_file.file import SingleFile
from lit_unlearn.diffusion.single_file.layout import AVERAGED, Place
from lit_unlearn.system.files import atomic_write

CONTENT_HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}
"""Hashes in metadata, each with its prefix: SHA-256 of everything behind the header, as in the examples of
Stability AI's ModelSpec and in ``addnet_hash_safetensors`` of kohya's scripts."""
LEGACY_HASHES = ("sshs_legacy_hash",)
"""Hashes that cannot be made anew: this one is of 64 KiB of a file that has other metadata, in an order by chance."""
PIECE = 1 << 22
"""Bytes that are copied at once."""


@dataclass
class Written:
    """What ``write_edits`` did besides replacing tensors.

    Attributes:
        rounded: Names of the weights that lost digits, by the type that the file has.
        remade: Hashes in the metadata that were computed anew.
        dropped: Entries of the metadata that were left out: hashes that cannot be computed, an earlier provenance.
        averaged: Number of tensors in a copy of the UNet that the edit did not change (``model_ema.*``).
    """

    rounded: dict[str, list[str]] = field(default_factory=dict)
    remade: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    averaged: int = 0

    def lines(self) -> list[str]:
        """One sentence for each thing that a user should know."""
        lines = [
            f"{len(names)} of the edited weights are rounded to {dtype}, which the file has them in"
            for dtype, names in self.rounded.items()
        ]
        if self.remade:
            lines.append(f"computed anew in the metadata: {', '.join(self.remade)}")
        if self.dropped:
            lines.append(f"left out of the metadata, since it no longer holds: {', '.join(self.dropped)}")
        if self.averaged:
            lines.append(
                f"{self.averaged} tensors {AVERAGED}* are an averaged copy of the UNet that the edit does not change: "
                "programs load it only when told to"
            )
        return lines


@dataclass(frozen=True)
class _Patch:
    """New content of some bytes: rows of ``value`` (any shape, in the type of the file), from the byte ``start``."""

    start: int
    value: Tensor
    rows: tuple[int, int] | None
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        number = self.value.numel()
        if self.rows is not None:
            number = number // self.value.shape[0] * (self.rows[1] - self.rows[0])
        return self.start + number * self.dtype.itemsize

    def content(self) -> bytes:
        value = self.value if self.rows is None else self.value[self.rows[0] : self.rows[1]]
        return value.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _patches(file: SingleFile, tensors: Mapping[str, Tensor]) -> Iterator[_Patch]:
    """New bytes for each weight, in no order."""
    for name, value in tensors.items():
        place = file.place(name)
        if tuple(value.shape) != place.shape:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)} and {file.path} has {place.shape} there: give the "
                "checkpoint of the model that was edited."
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite: the edit has failed, so make it again.")
        for key in (place.key, *place.copies):
            yield from _patches_of(file, key, place, name, value)


def _patches_of(file: SingleFile, key: str, place: Place, name: str, value: Tensor) -> Iterator[_Patch]:
    dtype = file.dtype_of(key)
    if not value.to(dtype).isfinite().all():
        raise ValueError(
            f"{name} holds numbers that are too large for {_name(dtype)}, which {file.path} has it in: give a "
            "checkpoint in bfloat16 or float32, or export a folder."
        )
    begin = file.data_start + file.header[key]["data_offsets"][0]
    if place.transposed or not place.rows:
        yield _Patch(begin, value.T if place.transposed else value, None, dtype)
        return
    bytes_per_row = value[0].numel() * dtype.itemsize
    taken = 0
    for start, stop in place.rows:
        yield _Patch(begin + start * bytes_per_row, value, (taken, taken + stop - start), dtype)
        taken += stop - start


def read_tensor(path: str | os.PathLike[str], name: str) -> Tensor:
    """The weight ``name`` of diffusers (part first) from a single file, in the file's type and diffusers' shape.

    Raises:
        ValueError: As ``SingleFile`` and ``SingleFile.read``.
    """
    return SingleFile(path).read(name)


def write_edits(
    source: SingleFile | str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    destination: str | os.PathLike[str],
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> Written:
    """Copy a single file with new values of some weights; every byte of the other weights is the same.

    The weights get the types that the file has. The order of the header stays, and so does the metadata, except for
    hashes of the content: they are computed anew where their definition is public, and left out otherwise. The file is
    copied in pieces.

    Args:
        source: The file to copy.
        tensors: New values by name in diffusers, part first; each has diffusers' shape.
        destination: The file to write.
        metadata: The provenance; ``lit_unlearn.`` is put before each name.
        overwrite: Whether an existing destination may be replaced.

    Raises:
        ValueError: A weight is missing in the file, has another shape, is quantised there, or is not finite; there is
            nothing to write; or the destination exists. Nothing is written then.
        WriteError: The destination cannot be written.
    """
    file = source if isinstance(source, SingleFile) else SingleFile(source)
    destination = Path(destination)
    if destination.exists() and (not overwrite or destination.samefile(file.path)):
        raise ValueError(f"output={destination} exists: choose another name.")
    if not tensors:
        raise ValueError(f"There is nothing to write into a copy of {file.path}: the edit changes no weight.")
    patches = sorted(_patches(file, tensors), key=lambda patch: patch.start)
    if any(first.stop > second.start for first, second in pairwise(patches)):
        raise ValueError(f"Two of the edited weights are the same one in {file.path}: leave one of them out.")
    written = Written(rounded=_rounded(file, tensors))
    written.averaged = file.layout.averaged if any(name.startswith("unet.") for name in tensors) else 0
    entries = {name: value for name, value in file.metadata.items() if not name.startswith(PROVENANCE)}
    written.dropped = [name for name in file.metadata if name not in entries or name in LEGACY_HASHES]
    entries = {name: value for name, value in entries.items() if name not in LEGACY_HASHES}
    written.remade = [name for name in entries if name in CONTENT_HASHES]
    entries |= {PROVENANCE + name: value for name, value in metadata.items()}
    # Of the length that the hashes will have, which are known after the last byte.
    entries |= {name: CONTENT_HASHES[name] + "0" * 64 for name in written.remade}
    with file.path.open("rb") as old, atomic_write(destination) as new:
        new.write(_header(file, entries))
        digest = hashlib.sha256() if written.remade else None
        old.seek(file.data_start)
        for patch in patches:
            _copy(old, new, digest, patch.start - old.tell())
            content = patch.content()
            new.write(content)
            if digest is not None:
                digest.update(content)
            old.seek(patch.stop)
        _copy(old, new, digest, None)
        if digest is not None:
            entries |= {name: CONTENT_HASHES[name] + digest.hexdigest() for name in written.remade}
            new.seek(0)
            new.write(_header(file, entries))
    return written


def _rounded(file: SingleFile, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name, value in tensors.items():
        if not torch.equal(value.to(dtype := file.dtype(name)).to(value.dtype), value):
            found[_name(dtype)].append(name)
    return dict(found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(file: SingleFile, metadata: Mapping[str, str]) -> bytes:
    """The header of ``file`` with other metadata, in the same order."""
    order = file.order if "__metadata__" in file.order else ["__metadata__", *file.order]
    content = {key: metadata if key == "__metadata__" else file.header[key] for key in order}
    return header_bytes(content)


def header_bytes(content: Mapping[str, Any]) -> bytes:
    """A header of safetensors, with its length before it; spaces at its end keep the weights aligned."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(old: BinaryIO, new: BinaryIO, digest: Any, number: int | None) -> None:
    """Copy so many bytes, or all that are left."""
    while number is None or number > 0:
        piece = old.read(PIECE if number is None else min(PIECE, number))
        if not piece:
            break
        new.write(piece)
        if digest is not None:
            digest.update(piece)
        number = None if number is None else number - len(piece)
