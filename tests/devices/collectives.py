"""Several processes with a device each, and collectives that refuse what NCCL refuses: tensors of any other place.

Underneath is gloo, on the memory behind the tensors. DDP itself is left out: it gathers gradients in C++, from memory
that the device does not have. The strategy does by hand what it would do, a mean over processes after each backward.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.distributed import distributed_c10d

from devices.accelerator import PretendAccelerator
from devices.pretend import NAME, OnDevice, Refused, Settings, memory_of, tensors_of

OF_TENSORS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "recv",
)
OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
"""These move what they have pickled to the right place by themselves."""

CALLS: Counter[str] = Counter()
"""How often each collective was called in this process."""
_within_objects = False


def checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The collective ``name``, for tensors of this process's device only."""

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if _within_objects:
            return original(*args, **kwargs)
        CALLS[name] += 1
        for tensor in tensors_of((*args, *kwargs.values())):
            if not isinstance(tensor, OnDevice):
                raise Refused(f"{name}: No backend type associated with device type {tensor.device.type}")
            if not tensor.memory.is_contiguous():
                raise Refused(f"{name}: Tensors must be contiguous")
            assert tensor.device == Settings.device, f"{name}: {tensor.device}, not {Settings.device}"
        return original(*map(memory_of, args), **{key: memory_of(value) for key, value in kwargs.items()})

    return collective


def passing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The collective ``name`` of objects, whose own tensors are its own business."""

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        global _within_objects
        CALLS[name] += 1
        _within_objects = True
        try:
            return original(*args, **kwargs)
        finally:
            _within_objects = False

    return collective


def without_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """``init_process_group`` that does not bind gloo to a device which only the wrappers know."""

    @functools.wraps(original)
    def start(*args: Any, device_id: torch.device | None = None, **kwargs: Any) -> Any:
        assert device_id in (None, Settings.device), device_id
        return original(*args, **kwargs)

    return start


class PretendDDP(DDPStrategy):
    """Distributed data parallel on the device."""

    def _setup_model(self, model: nn.Module) -> Any:
        return model

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.grad is not None:
                whole = parameter.grad.contiguous()
                torch.distributed.all_reduce(whole)
                parameter.grad.copy_(whole / self.world_size)


def register() -> list[str]:
    """Wrap the collectives and make the strategy known; returns the arguments of a trainer that takes it."""
    for names, wrap in ((OF_TENSORS, checked), (OF_OBJECTS, passing)):
        for name in names:
            wrapped = wrap(name, getattr(distributed_c10d, name))
            setattr(distributed_c10d, name, wrapped)
            setattr(torch.distributed, name, wrapped)
    torch.distributed.init_process_group = without_device(torch.distributed.init_process_group)
    StrategyRegistry.register(
        f"{NAME}_ddp", PretendDDP, "a device for each process", accelerator=PretendAccelerator(),
        process_group_backend="gloo",
    )  # fmt: skip
    return [f"--trainer.strategy={NAME}_ddp", "--trainer.devices=2"]


def calls() -> dict[str, int]:
    """``CALLS``, for tests."""
    return dict(CALLS)


def refuses(name: str) -> str:
    """What a collective says to a tensor of the processor, once the processes have found each other."""
    tensor = torch.zeros(2)
    arguments: dict[str, tuple[Any, ...]] = {
        "all_reduce": (tensor,),
        "all_gather": ([torch.zeros(2), torch.zeros(2)], tensor),
        "all_gather_into_tensor": (torch.zeros(4), tensor),
        "broadcast": (tensor, 0),
        "reduce": (tensor, 0),
    }
    try:
        getattr(torch.distributed, name)(*arguments[name])
    except Refused as error:
        return str(error)
    return "it does not refuse"
