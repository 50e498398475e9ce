"""Archives that are pickles: checked before they are read, and read without running code."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

UNPICKLING_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that torch and zipfile raise for a damaged or malicious file."""


def check_archive(path: Path) -> None:
    """Refuse a damaged or compressed archive; torch does not verify what it reads, but each file has a checksum."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, which torch never does")  # a small file could fill memory
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def load_archive(path: Path) -> Any:
    """The content of an archive of tensors.

    Raises:
        UNPICKLING_ERRORS: It is no archive, is damaged, or holds other objects than tensors and plain containers.
    """
    check_archive(path)
    return torch.load(path, weights_only=True, map_location="cpu")


def load_pickle(path: Path) -> Any:
    """The content of any pickle of tensors, also in the format before archives; tensors stay on the disk until used.

    Raises:
        UNPICKLING_ERRORS: It is damaged, or holds other objects than tensors and plain containers.
    """
    archive = zipfile.is_zipfile(path)
    if archive:
        check_archive(path)
    return torch.load(path, weights_only=True, map_location="cpu", mmap=archive)  # only an archive can be mapped
