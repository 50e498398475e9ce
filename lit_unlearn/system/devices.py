"""Devices: which one a command runs on, what it is called, and where float64 is kept and solved.

Closed forms need float64, and not every device has it or is quick at it. Where sums and solves run is decided here and
nowhere else: on the device if it solves float64 at a good part of its speed in float32, else on the processor. What
they find goes back to the weights in the weights' own type.

    for_solving(tensor)      float64, on solving_device(tensor.device)
    float64_device(device)   where float64 may lie: the device itself, or the processor if the device has none

That memory ran out each device says in words of its own; ``is_out_of_memory`` knows them.
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
"""Compute capabilities of the cards that do float64 at half of their speed in float32: P100, V100, A100, H100, B200.

All others do it at a 32nd or a 64th: an eigendecomposition is then quicker on the processor.
"""
FAST_FLOAT64_AMD = ("gfx908", "gfx90a", "gfx94", "gfx95")
"""How the names of AMD's architectures begin that are as quick at it: MI100, MI200, MI300, MI350."""


OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|cannot allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What PyTorch, cuBLAS and cuDNN say when memory runs out, on a GPU or on the processor."""


def find_device(name: str | None = None) -> torch.device:
    """The device called ``name`` (``cpu``, ``cuda``, ``cuda:1``, ``mps``); without a name, the GPU if there is one.

    Raises:
        ValueError: This machine does not have it, or the installed PyTorch cannot use it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={name!r} cannot be used here ({reason}): try --device cpu.") from error


def device_name(device: torch.device) -> str:
    """What a person calls ``device``: ``the processor``, ``NVIDIA H100 80GB HBM3``, ``Apple's GPU``."""
    if device.type == "cpu":
        return "the processor"
    if device.type == "mps":
        return "Apple's GPU"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device)


def solving_device(device: torch.device) -> torch.device:
    """Where sums and solves of what lies on ``device`` run: there, or on the processor if that is quicker."""
    return device if device.type == "cpu" or _is_fast(str(device)) else CPU


def float64_device(device: torch.device) -> torch.device:
    """Where float64 that belongs to ``device`` may lie: there, or on the processor if the device has no float64."""
    return device if device.type == "cpu" or _has_float64(str(device)) else CPU


def for_solving(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on ``solving_device`` of the device that it lies on."""
    return tensor.to(solving_device(tensor.device)).double()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or the processor, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def explaining_memory(what: str, device: torch.device, ways: Sequence[str]) -> Iterator[None]:
    """Say in one sentence that memory ran out in the block, and what takes less.

    Args:
        what: What the block does, such as ``fit``.
        device: Where.
        ways: What would take less memory, each as an advice; with none, another machine is all that is left.

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
    """Asked of the device itself: a list of those without it would be out of date."""
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum().item()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # Apple's GPUs raise the one, Intel's Arc the other
        return False
    return True


@cache
def _is_fast(device: str) -> bool:
    """Whether a device other than the processor is quick at float64; by its model, so that numbers do not vary."""
    if torch.device(device).type != "cuda":
        return False
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(FAST_FLOAT64_AMD)
    return torch.cuda.get_device_capability(device) in FAST_FLOAT64
