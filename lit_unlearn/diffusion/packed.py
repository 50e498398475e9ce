"""Convolutions whose weights are packed once for many calls, in the layout that oneDNN computes in on a processor.

    with packing():                      # within the block, weights do not change
        packed_convolution(x, weight, ...)

oneDNN puts the weights of a convolution into a layout of its own in every call. With one picture at once this takes a
quarter of a UNet's convolutions. Packed weights are forgotten at the end of the block, so none outlives an edit. Only
small convolutions are packed, where it pays, and at most ``MOST`` bytes of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST = 2**28
"""Bytes of weights that are packed at most within one block."""
PLACES = 1024
"""Positions, of all pictures together, that a convolution may have to be packed; with more it gains less than 3%."""


class _Block:
    """The packed weights of one ``packing`` block."""

    def __init__(self) -> None:
        self.bytes = 0
        self.weights: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def find(self, x: Tensor, weight: Tensor, given: Geometry) -> Tensor | None:
        """``weight`` packed for inputs of the shape of ``x``; None if it is not packed."""
        key = weight.data_ptr(), x.shape, x.dtype, given
        if key not in self.weights:
            fits = (
                x.device.type == weight.device.type == "cpu"
                and x.dtype == weight.dtype
                and x.dtype in (torch.float32, torch.bfloat16)
                and len(x) * x.shape[2] * x.shape[3] <= PLACES
                and self.bytes + weight.nbytes <= MOST
                and torch.backends.mkldnn.is_available()
            )
            made = torch.ops.mkldnn._reorder_convolution_weight(weight, *given, list(x.shape)) if fits else None
            self.bytes += weight.nbytes if fits else 0
            self.weights[key] = weight, made  # the weight too: its address stays its own while the block lasts
        return self.weights[key][1]


class Geometry(NamedTuple):
    """Arguments of a two-dimensional convolution, in the order of oneDNN's kernels in PyTorch."""

    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


_BLOCK: ContextVar[_Block | None] = ContextVar("packing", default=None)
_SAME: dict[Any, bool] = {}
"""Whether a packed convolution gives the same bits as PyTorch's own, by everything that PyTorch chooses kernels by."""


@contextmanager
def packing() -> Iterator[None]:
    """Within the block, weights that ``packed_convolution`` and ``same_convolution`` get do not change."""
    token = _BLOCK.set(_Block())
    try:
        yield
    finally:
        _BLOCK.reset(token)


def packed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution (B, C, H, W) of ``x``, with packed weights within ``packing``; equal up to the last bits.

    Arguments are those of ``torch.conv2d``.
    """
    given = Geometry(tuple(padding), tuple(stride), tuple(dilation), groups)
    block = _BLOCK.get()
    packed = None if block is None else block.find(x, weight, given)
    if packed is None:
        return torch.conv2d(x, weight, bias, given.stride, given.padding, given.dilation, groups)
    return _compute(x, packed, bias, given)


def same_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """As ``layer(x)``, bit for bit, with packed weights within ``packing``; ``layer`` must be ``packable``.

    Where PyTorch would choose oneDNN, the first result for each shape in a process is computed both ways; if any bit
    differs, such convolutions are not packed.
    """
    block, weight, bias = _BLOCK.get(), layer.weight, layer.bias
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if block is None or gradient or torch.is_autocast_enabled(x.device.type):
        return nn.Conv2d.forward(layer, x)
    given = Geometry(layer.padding, layer.stride, layer.dilation, layer.groups)  # type: ignore[arg-type]
    key = x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), bias is None, given, _settings()
    if _SAME.get(key) is False:
        return nn.Conv2d.forward(layer, x)
    if (packed := block.find(x, weight, given)) is None:
        return nn.Conv2d.forward(layer, x)
    output = _compute(x, packed, bias, given)
    if key not in _SAME:
        usual = nn.Conv2d.forward(layer, x)
        _SAME[key] = torch.equal(output, usual) and output.stride() == usual.stride()
        return usual
    return output


def packable(layer: nn.Module) -> bool:
    """Whether ``same_convolution`` can compute ``layer``."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _compute(x: Tensor, packed: Tensor, bias: Tensor | None, given: Geometry) -> Tensor:
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *given, "none", [], "")
    return output


def _settings() -> tuple[Any, ...]:
    """What else PyTorch chooses kernels by."""
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled


# Compiled: an operation of its own in place of each convolution, which the compiler calls as it is.


def _operation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """As ``packed_convolution``, in the layout that the compiler expects."""
    output = packed_convolution(x, weight, bias, stride, padding, dilation, groups)
    return output.contiguous(memory_format=torch.channels_last)


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """An empty output of ``_operation``, for the compiler."""
    made = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return made.contiguous(memory_format=torch.channels_last)


_LIBRARY = torch.library.Library("lit_unlearn", "DEF")
_LIBRARY.define(
    "packed_convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.impl("packed_convolution", _operation, "CPU")
torch.library.register_fake("lit_unlearn::packed_convolution", _shape, lib=_LIBRARY)


def processor_options() -> dict[str, Any]:
    """Options of ``torch.compile`` with which convolutions on a processor read packed weights within ``packing``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Packing(CustomGraphPass):
        """Puts ``packed_convolution`` in place of two-dimensional convolutions."""

        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
                x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
                if transposed or weight.meta["val"].ndim != 4 or x.meta["val"].device.type != "cpu":
                    continue
                with graph.inserting_before(node):
                    target = torch.ops.lit_unlearn.packed_convolution.default
                    made = graph.call_function(target, (x, weight, bias, stride, padding, dilation, groups))
                made.meta.update(node.meta)
                node.replace_all_uses_with(made)
                graph.erase_node(node)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return {"post_grad_custom_pre_pass": Packing()}


__all__ = ["packable", "packed_convolution", "packing", "processor_options", "same_convolution"]
