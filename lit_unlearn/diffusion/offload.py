"""Keeps the parts of a pipeline in the processor's memory, and moves each to the device when it is used.

    Offload(pipeline.parts, torch.device("cuda"))
    pipeline.draw(...)          # text encoders, denoiser, autoencoder: one after the other on the device

A part comes when it is called, and goes when another one comes. It stays while it is held: a part whose output carries
gradients until ``release``, which must follow the backward pass; and within ``holding``. diffusers has the same as
``enable_model_cpu_offload``, but without the two exceptions, so that a gradient through two parts would fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

_OF: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()
"""The offload that moves a part, if there is one."""


class Offload:
    """Moves the parts of a pipeline between the processor's memory and a device.

    Args:
        parts: The parts by name; they lie in the processor's memory.
        device: The device that they compute on.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device) -> None:
        self.parts, self.device = dict(parts), device
        self.present: set[str] = set()
        self.held: set[str] = set()
        for name, part in self.parts.items():
            _OF[part] = self
            part.register_forward_pre_hook(self._before(name), with_kwargs=True)
            part.register_forward_hook(self._after(name))

    def bring(self, names: Iterable[str]) -> None:
        """Move parts to the device, after all others that are not held have left it."""
        wanted = set(names)
        for name in self.present - wanted - self.held:
            self.parts[name].to("cpu")
            self.present.discard(name)
        for name in sorted(wanted - self.present):
            self.parts[name].to(self.device)
            self.present.add(name)

    def release(self) -> None:
        """After a backward pass: no gradient needs the parts any more; they leave when another one comes."""
        self.held.clear()

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block, these parts are on the device."""
        names = set(names)
        self.bring(names)
        before = set(self.held)
        self.held |= names
        try:
            yield
        finally:
            self.held = before

    def _before(self, name: str) -> Any:
        def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self.bring([name])
            return tree_map(self._placed, args), tree_map(self._placed, kwargs)

        return move

    def _after(self, name: str) -> Any:
        def hold(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values = output.values() if isinstance(output, Mapping) else tree_leaves(output)
            if any(value.requires_grad for value in tree_leaves(list(values)) if isinstance(value, Tensor)):
                self.held.add(name)

        return hold

    def _placed(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


def bring(part: nn.Module) -> None:
    """If ``part`` is moved by an ``Offload``, have it on the device, for code that does not call the part itself."""
    if (found := _OF.get(part)) is not None:
        found.bring([name for name, module in found.parts.items() if module is part])


def computing_device(part: nn.Module) -> torch.device:
    """The device that ``part`` computes on, also while it is away."""
    found = _OF.get(part)
    return next(part.parameters()).device if found is None else found.device


def call_with(part: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """The output of ``part`` with ``values`` in place of its own weights, by their names within it."""
    bring(part)  # not within: its weights are exchanged there
    device = computing_device(part)
    return functional_call(part, {name: value.to(device) for name, value in values.items()}, args, kwargs)


__all__ = ["Offload", "bring", "call_with", "computing_device"]
