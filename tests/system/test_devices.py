"""Which device is taken, what it is called, where float64 is solved, and what is said when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from lit_unlearn.system import devices
from lit_unlearn.system.errors import UserError

CUDA, MPS = torch.device("cuda:0"), torch.device("mps")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was found out about a device that is only pretended must not stay known."""
    yield
    devices._has_float64.cache_clear()
    devices._is_fast.cache_clear()


@pytest.fixture
def allocated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device can be had."""
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=torch.device(device)))


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_is_taken_if_there_is_one(
    allocated_on: None, monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.find_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["mps", "cuda:7", "toaster", ""])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^device='{name}' cannot be used here \(.*[^.]\): try --device cpu\.$"):
        devices.find_device(name)


def test_what_a_device_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA A100 number {device.index}")
    names = [devices.device_name(torch.device(name)) for name in ("cpu", "mps", "cuda:1")]
    assert names == ["the processor", "Apple's GPU", "NVIDIA A100 number 1"]


@pytest.mark.parametrize(
    ("capability", "fast"),
    [
        ((6, 0), True),
        ((8, 0), True),
        ((9, 0), True),
        ((7, 5), False),
        ((8, 6), False),
        ((8, 9), False),
        ((12, 0), False),
    ],
)
def test_an_nvidia_card_solves_what_it_is_quick_at(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fast: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.solving_device(CUDA) == (CUDA if fast else devices.CPU)


@pytest.mark.parametrize(("architecture", "fast"), [("gfx90a:sramecc+:xnack-", True), ("gfx1100", False)])
def test_an_amd_card_solves_what_it_is_quick_at(monkeypatch: pytest.MonkeyPatch, architecture: str, fast: bool) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert devices.solving_device(CUDA) == (CUDA if fast else devices.CPU)


def test_other_gpus_leave_solving_to_the_processor() -> None:
    assert devices.solving_device(MPS) == devices.solving_device(torch.device("xpu")) == devices.CPU
    assert devices.solving_device(devices.CPU) == devices.CPU


@pytest.mark.parametrize(
    "error", [TypeError("Cannot convert a MPS Tensor to float64"), RuntimeError("Required aspect fp64")]
)
def test_float64_goes_to_the_processor_if_the_device_refuses_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*size: int, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", refuse)
        assert devices.float64_device(MPS) == devices.CPU
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", lambda *size, **options: torch.zeros(1))
        assert devices.float64_device(CUDA) == CUDA


def test_a_full_device_is_not_taken_for_one_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        devices.float64_device(CUDA)


def test_what_is_solved_is_in_float64() -> None:
    half = torch.tensor([0.1], dtype=torch.bfloat16)
    found = devices.for_solving(half)
    assert (found.dtype, found.item()) == (torch.float64, half.float().item())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 5.08 GB, other allocations: 1.2 GB, max allowed: 6 GB)"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_one_sentence(error: Exception) -> None:
    with pytest.raises(UserError) as told, devices.explaining_memory("fit", devices.CPU, ["lower this", "raise that"]):
        raise error
    assert str(told.value) == "fit: the processor ran out of memory; lower this, or raise that."


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="sizes 3 and 4"), devices.explaining_memory("fit", devices.CPU, []):
        raise RuntimeError("sizes 3 and 4 do not match")
