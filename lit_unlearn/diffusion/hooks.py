"""Reads inputs and replaces outputs of linear layers; the hooks are removed when their block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def capture_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the detached input of each layer at its latest call: keys K, (B, L, d_in), by the names of ``layers``."""
    captured: dict[str, Tensor] = {}
    with each_input(layers, captured.__setitem__):
        yield captured


@contextmanager
def each_input(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Give the name and the detached input (B, L, d_in) of each of ``layers`` to ``take`` whenever it is called."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                take(name, args[0].detach())

            stack.callback(layer.register_forward_pre_hook(record).remove)
        yield


@contextmanager
def begin_at(stack: nn.Module, number: int, states: Tensor) -> Iterator[None]:
    """Let the layers of a CLIP before the layer ``number`` compute nothing: each of them returns ``states``.

    The hidden states of earlier layers are therefore wrong within the block.

    Args:
        stack: What calls the modules in its list ``layers`` one after the other.
        number: Number of the first layer that computes.
        states: What it reads, (B, L, D).
    """
    layers = stack.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    with ExitStack() as undo:
        for layer in layers[:number]:
            undo.callback(vars(layer).update, {"forward": layer.forward} if "forward" in vars(layer) else {})
            undo.callback(vars(layer).pop, "forward", None)
            layer.forward = lambda *_args, **_others: states
        yield


@contextmanager
def replace_output(layer: nn.Linear, values: Tensor, mask: Tensor) -> Iterator[None]:
    """Replace the layer's output by ``values`` plus its bias where ``mask`` is true.

    Args:
        layer: A linear layer that is called with (B, L, d_in), or with (B, d_in) as if L was 1. Positions behind the
            first L stay as they are.
        values: V without the bias, (B, L, d_out); gradients flow into it.
        mask: (B, L) bool.
    """

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        replacement = values if layer.bias is None else values + layer.bias
        if output.ndim == 2:
            return torch.where(mask, replacement.squeeze(1).to(output.dtype), output)
        length = mask.shape[1]
        found = torch.where(mask.unsqueeze(-1), replacement.to(output.dtype), output[:, :length])
        return found if length == output.shape[1] else torch.cat([found, output[:, length:]], dim=1)

    handle = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
