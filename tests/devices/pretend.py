"""A device that refuses what a GPU refuses, for machines that have none.

Its tensors are wrappers around tensors in ordinary memory: every operation is checked, then run on the processor. So
what it finds is what the processor finds, to the last bit, and a program that passes here has put each tensor where a
GPU would have needed it. What it does not show: speed, memory, kernels that a GPU lacks, other sums in the last bits.

Refused, each with a message like PyTorch's own (``test_pretend.py`` has an example of each, and of what is allowed):

    two devices in one operation        except numbers (0-dim tensors of the processor), and copies
    a tensor of the processor indexed   by one of the device; the other way round is allowed
    values on another device            assigned to a selection by index or mask
    a generator of the processor        for random numbers made on the device
    numpy of a tensor of the device     it must come to the processor first
    the address of its memory           what C code asks for
    float64                             if the device has none, as Apple's GPUs: made there, moved there or computed

``register`` changes the whole process for good: PyTorch has one private-use backend, which is given this name, modules
exchange their parameters for those of another class when they move, and a dispatch mode stands before every operation.
So it is called in processes of its own only (``worker.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"
aten = torch.ops.aten

INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""The second argument of these is a list of indices; the third, if there is one, are the values."""
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default, *INDEXED}
"""What may be given tensors of two devices; ``INDEXED`` are checked on their own."""


class Refused(RuntimeError):
    """What a GPU would have refused, too."""


class Float64Bytes:
    """How much of the device's memory holds float64: now, and at most since ``restart``."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, memory: Tensor) -> None:
        """Count the storage of ``memory`` until nothing holds it any more."""
        storage = memory.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """Bytes of all storages that something holds."""
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        return sum(size for _, size in self._storages.values())

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now()


class Settings:
    """What kind of device it is in this process."""

    has_float64 = True
    device: torch.device
    """Known once it is registered. Each process sees one, also if several have a device each."""
    float64_bytes = Float64Bytes()
    written: dict[int, StorageWeakRef] = {}  # noqa: RUF012
    """Storages that go into a file as the device's."""
    kernels: torch.library.Library
    """What is called without a wrapper's being asked; it lasts as long as this."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``memory`` is the tensor of the processor that holds its numbers."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor, requires_grad: bool = False) -> OnDevice:
        assert type(memory) is Tensor and memory.device.type == "cpu", (type(memory), memory.device)
        if memory.dtype in (torch.float64, torch.complex128):
            if not Settings.has_float64:
                raise TypeError(f"{Settings.device} has no {memory.dtype}: use float32, or the processor.")
            Settings.float64_bytes.add(memory)
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=Settings.device,
            requires_grad=requires_grad,
        )
        new.memory = memory
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.memory!r}, device={str(self.device)!r})"

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        raise Refused(f"The memory of {self.device} cannot be read by its address: use Tensor.cpu() first.")

    # The next two are torch's for plain tensors, of every device.

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            assert self.is_leaf, "torch copies leaves only"
            copied = OnDevice(self.memory.clone(), self.requires_grad)
            memo[id(self)] = as_parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of any tensor, with its storage marked as the device's: see ``location_of``."""
        memory = self.memory.detach()
        storage = memory.untyped_storage()
        Settings.written[storage._cdata] = StorageWeakRef(storage)
        return memory.requires_grad_(self.requires_grad).__reduce_ex__(protocol)


def as_parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=tensor.requires_grad)


# --- operations


def tensors_of(args: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of an operation; they lie in lists at most."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def memory_of(value: Any) -> Any:
    """``value`` with the processor's tensors in place of the device's."""
    if isinstance(value, OnDevice):
        return value.memory
    if isinstance(value, (list, tuple)):
        return type(value)(map(memory_of, value))
    return value


def on_device(value: Any) -> Any:
    """The opposite of ``memory_of``, for the results of an operation."""
    if isinstance(value, Tensor):
        return OnDevice(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_device, value))
    return value


@cache
def written_arguments(func: Any) -> list[int | str | None]:
    """For each result of ``func``, the argument that it is, if it is one that was written to: ``add_``, ``out=``."""
    arguments = {}
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            arguments[frozenset(argument.alias_info.before_set)] = argument.name if argument.kwarg_only else place
    found = [result.alias_info for result in func._schema.returns]
    return [arguments.get(frozenset(alias.before_set)) if alias and alias.is_write else None for alias in found]


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation and run it in memory; its result lies where a GPU would have left it."""
    result_here = any(isinstance(tensor, OnDevice) for tensor in tensors_of((*args, *kwargs.values())))
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        result_here = device.type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu") if result_here else device}
    check(func, args, kwargs, result_here)
    if torch.Tag.inplace_view in func.tags:  # squeeze_ and others: a wrapper's shape is its own
        with no_dispatch():
            func(*args, **kwargs)
    result = func(*map(memory_of, args), **{name: memory_of(value) for name, value in kwargs.items()})
    if not result_here or func is aten._local_scalar_dense.default:
        return result
    places = written_arguments(func)
    if not any(place is not None for place in places):
        return on_device(result)
    results = result if len(places) > 1 else (result,)
    own = [
        on_device(value) if place is None else kwargs[place] if isinstance(place, str) else args[place]
        for place, value in zip(places, results, strict=True)
    ]
    return tuple(own) if len(places) > 1 else own[0]


def check(func: Any, args: Any, kwargs: dict[str, Any], result_here: bool) -> None:
    """Refuse what a GPU refuses.

    Raises:
        Refused: Why.
    """
    generator = kwargs.get("generator")
    if generator is None:  # some operations take it by place
        generator = next((value for value in args if isinstance(value, torch.Generator)), None)
    if generator is not None and result_here and generator.device.type != NAME:
        raise Refused(f"{func}: Expected a {NAME!r} device type for generator but found {generator.device.type!r}")
    if func in INDEXED:
        check_index(func, *args[:3])
    elif func not in BETWEEN_DEVICES:
        found = list(tensors_of((*args, *kwargs.values())))
        here = [tuple(tensor.shape) for tensor in found if isinstance(tensor, OnDevice)]
        there = [tuple(tensor.shape) for tensor in found if not isinstance(tensor, OnDevice)]
        if here and any(there):  # numbers, of shape (), go with everything
            raise Refused(
                f"{func}: Expected all tensors to be on the same device, but {here} are on {Settings.device} "
                f"and {there} on cpu"
            )


def check_index(func: Any, source: Tensor, indices: list[Tensor | None], values: Tensor | None = None) -> None:
    """As ``check``, for ``source[indices]`` and ``source[indices] = values``."""
    if not isinstance(source, OnDevice) and any(isinstance(index, OnDevice) for index in indices):
        raise Refused(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if values is not None and values.dim() and isinstance(source, OnDevice) != isinstance(values, OnDevice):
        raise Refused(f"{func}: expected values on {source.device} but found {values.device}")


class Mode(TorchDispatchMode):
    """Sees operations without a tensor of the device: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            return run(func, args, kwargs)
        if any(isinstance(tensor, OnDevice) for tensor in tensors_of((*args, *kwargs.values()))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


# --- the backend


# An older torch has none; there this file can be imported all the same, and conftest.py skips the tests.
class Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What ``torch.pretend`` offers; random numbers without a generator are those of the processor."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Nothing: it is the processor's, which is set on its own."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing: every operation has ended when it returns."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def location_of(storage: Any) -> str | None:
    """What ``torch.save`` notes of a storage: where it lay, as ``cuda:0`` in files that a GPU's process wrote."""
    storage = getattr(storage, "_untyped_storage", storage)
    reference = Settings.written.get(storage._cdata)
    return str(Settings.device) if reference is not None and not reference.expired() else None


def restore(storage: Any, location: str) -> None:
    """Refuse to read a file without ``map_location``: it is sure to fail on a machine without the device."""
    if location.startswith(NAME):
        raise Refused(f"A storage of {location} is read without map_location.")


def number(tensor: Tensor) -> Any:
    """``Tensor.item`` where wrappers are not asked: ``torch.tensor`` of a list of numbers of the device."""
    assert isinstance(tensor, OnDevice)
    return tensor.memory.item()


def register(has_float64: bool) -> Callable[[], Mode]:
    """Make the device known to PyTorch, in this process and for good.

    Args:
        has_float64: Whether it has float64.

    Returns:
        The dispatch mode under which everything that uses the device must run.
    """
    Settings.has_float64 = has_float64
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    Settings.device = torch.device(NAME, 0)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a weight stays the same object when its module moves
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes it on the processor, then moves it
    torch.serialization.register_package(1, location_of, restore)  # asked before the processor's
    Settings.kernels = torch.library.Library("aten", "IMPL")
    Settings.kernels.impl("_local_scalar_dense", number, "PrivateUse1")
    return Mode
