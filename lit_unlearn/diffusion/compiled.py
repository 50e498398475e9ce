"""Draws with kernels that ``torch.compile`` makes of the denoiser and of the autoencoder's decoder.

    compile_drawing(pipeline)                 # from now on ``pipeline.draw`` and ``pipeline.sample`` use them
    with compiled_forward(pipeline.denoiser): # what they do; False if it is not compiled
        ...

Only pictures are drawn so: a gradient, and a single prediction, is computed as always. The kernels are made when the
first picture is drawn, and again for a second batch size; PyTorch keeps them on disk for later processes. They read the
weights of the module, so an edit needs no others. Pictures differ in the last bits from those that are drawn without.

With one picture at once PyTorch's checks before each call (guards) take longer than many kernels. They are made for the
first step of a chain only, since nothing that they check may change within it, and for arguments of another form.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_unlearn.system.errors import UserError

if TYPE_CHECKING:
    from lit_unlearn.diffusion.pipeline import Pipeline

COMPILERS = {"win32": "cl", "darwin": "clang++"}
"""The compiler of C++ that PyTorch calls on each system, if the variable CXX names none; on others it is g++."""

_OF: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()
"""The compiled ``forward`` of a module, which takes the module as its first argument."""


def check_compiler(device: torch.device, field: str) -> None:
    """Refuse to compile where PyTorch lacks what it needs for it.

    Args:
        device: Device that pictures are drawn on.
        field: Name of the option, which begins the message.

    Raises:
        UserError: There is no Triton for a GPU of NVIDIA or AMD, or no compiler of C++.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(
            f"{field} needs Triton on {device.type}, which is not installed: pip install triton, or omit it."
        )
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{field} needs a compiler of C++, and there is no {compiler}: install it, name another one in the "
            "environment variable CXX, or omit the option."
        )


def compile_drawing(pipeline: Pipeline) -> None:
    """Let ``pipeline`` draw with compiled kernels; nothing is compiled before the first picture.

    Raises:
        ValueError: Something has replaced the ``forward`` of a part, such as a hook of accelerate.
    """
    for module in (pipeline.denoiser, pipeline.vae.decoder):
        if "forward" in vars(module):
            raise ValueError(
                f"torch_compile cannot be used with this {type(module).__name__}, whose forward is replaced: omit it."
            )
        # Not of the bound method: it would keep the module alive, and a copy of it would draw with this one's weights.
        _OF[module] = torch.compile(type(module).forward)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is called with compiled kernels when pictures are drawn."""
    return module in _OF


@contextmanager
def compiled_forward(module: nn.Module) -> Iterator[bool]:
    """Within the block, ``module`` computes with its compiled kernels; yields whether it has some.

    Neither a weight nor anything else of the module may change within the block.

    Raises:
        UserError: PyTorch cannot compile it, for instance because an interrupted run damaged its cache.
    """
    if (compiled := _OF.get(module)) is None:
        yield False
        return
    module.forward = _checked_once(partial(compiled, module))
    try:
        with warnings.catch_warnings():
            # Of functions that the compiler leaves to Python, which are many and change nothing.
            warnings.filterwarnings("ignore", module="torch._dynamo|torch._inductor")
            yield True
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # its import takes seconds, unless something was compiled
        from torch._inductor.codecache import cache_dir

        if not isinstance(error, TorchDynamoException):
            raise
        reason = getattr(error, "inner_exception", error)
        first_line = str(reason).partition("\n")[0]
        raise UserError(
            f"PyTorch cannot compile the {type(module).__name__} ({type(reason).__name__}: {first_line}). If a run "
            f"was interrupted while it compiled, delete PyTorch's cache {cache_dir()} and run again; else omit "
            "torch_compile."
        ) from error
    finally:
        del module.forward


def _checked_once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute``, for which PyTorch checks its guards only where arguments are unlike those of the call before.

    Where PyTorch refuses to go without, such as behind its limit of kernels for one function, or for a module that it
    compiles in several pieces, they are checked at every call.
    """
    last: Any = None
    refused = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal last, refused
        given = [_kind(value) for value in tree_leaves((args, kwargs))], sorted(kwargs), torch.is_grad_enabled()
        known, last = given == last and not refused, None
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if known else nullcontext():
                output = compute(*args, **kwargs)
        except RuntimeError as error:
            if not known or "skip_guard_eval_unsafe" not in str(error):
                raise
            refused = True
            output = compute(*args, **kwargs)
        last = given  # not after an error
        return output

    return forward


def _kind(value: Any) -> Any:
    """What PyTorch's guards check of an argument."""
    if not isinstance(value, Tensor):
        return value
    autocast = torch.is_autocast_enabled(value.device.type)
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_inference(), autocast


__all__ = ["check_compiler", "compile_drawing", "compiled_forward", "is_compiled"]
