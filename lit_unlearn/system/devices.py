"""Devices: finds the device of a command, names it for the user, and chooses where float64 is stored and solved.

Closed forms need float64, and some devices do not have it or are slow at it. Only this module decides where sums and
solves run: on the device if its float64 is not much slower than its float32, otherwise on the processor (the CPU). The
results are converted back to the type of the weights.

    for_solving(tensor)      float64, on solving_device(tensor.device)
    float64_device(device)   where float64 can be stored: the device itself, or the processor if it lacks float64

Each device reports that memory ran out in its own words; ``is_out_of_memory`` recognises them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from lit_unlearn.system.errors import UserError

CPU = torch.device("cpu")

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of the GPUs whose float64 is half as fast as their float32: P100, V100, A100, H100, B200.

On all others float64 is 32 or 64 times slower than float32, so an eigendecomposition is faster on the processor.
"""
FAST_FLOAT64_AMD = ("gfx908", "gfx90a", "gfx94", "gfx95")
"""Beginnings of the names of AMD's architectures with equally fast float64: MI100, MI200, MI300, MI350."""


OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|cannot allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""Messages of PyTorch, cuBLAS and cuDNN when memory runs out, on a GPU or on the processor."""


def find_device(name: str | None = None) -> torch.device:
    """The device called ``name`` (``cpu``, ``cuda``, ``cuda:1``, ``mps``); without a name, the GPU if there is one.

    Raises:
        ValueError: This machine does not have the device, or the installed PyTorch cannot use it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={name!r} cannot be used here ({reason}): try --device cpu.") from error


def device_name(device: torch.device) -> str:
    """Name of ``device`` for messages: ``the processor``, ``NVIDIA H100 80GB HBM3``, ``Apple's GPU``."""
    if device.type == "cpu":
        return "the processor"
    if device.type == "mps":
        return "Apple's GPU"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device)


def solving_device(device: torch.device) -> torch.device:
    """Where to sum and solve tensors that are on ``device``: there, or on the processor if that is faster."""
    return device if device.type == "cpu" or _is_fast(str(device)) else CPU


def float64_device(device: torch.device) -> torch.device:
    """Where to store float64 tensors for ``device``: there, or on the processor if the device has no float64."""
    return device if device.type == "cpu" or _has_float64(str(device)) else CPU


def for_solving(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float64, on ``solving_device`` of its device."""
    return tensor.to(solving_device(tensor.device)).double()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device, or the processor, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def explaining_memory(what: str, device: torch.device, ways: Sequence[str]) -> Iterator[None]:
    """If memory runs out in the block, say so in one sentence, and say how to use less.

    Args:
        what: Name of the task, such as ``fit``.
        device: Device of the task.
        ways: Advice on how to use less memory, one text per way; if empty, the message advises a smaller model or a
            machine with more memory.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = ", or ".join(ways or ["take a smaller model, or a machine with more memory"])
        raise UserError(f"{what}: {device_name(device)} ran out of memory; {remedy}.") from error


@cache
def _has_float64(device: str) -> bool:
    """Whether the device has float64, found by a trial, since a list of devices would become outdated."""
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum().item()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # Apple's GPUs raise the one, Intel's Arc the other
        return False
    return True


@cache
def _is_fast(device: str) -> bool:
    """Whether a device other than the processor has fast float64; decided by its model, so that runs are repeatable."""
    if torch.device(device).type != "cuda":
        return False
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(FAST_FLOAT64_AMD)
    return torch.cuda.get_device_capability(device) in FAST_FLOAT64
