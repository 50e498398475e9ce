"""Takes the steps of a chain faster on the same weights and texts; no bit of a picture changes, unless it is compiled.

    with fixed_texts(pipeline.denoiser):
        ...   # many predictions with the same condition

Two costs of each step are the same in all of them: keys and values of the text in a UNet's cross-attention, and in
diffusers' ``Attention`` a look-up of the arguments of its processor, which takes longer than a small attention. A
denoiser that is compiled (``compiled.py``) needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.compiled import compiled_forward

Map = Callable[[Tensor], Tensor]


@contextmanager
def fixed_texts(denoiser: nn.Module) -> Iterator[None]:
    """Within the block, no weight changes and no gradient is needed.

    Modules whose ``forward`` is replaced already, and attention by another processor than diffusers' default, stay as
    they are.

    Args:
        denoiser: The denoiser; only UNets have something to gain.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    with ExitStack() as stack:
        compiled = stack.enter_context(compiled_forward(denoiser))
        for name, module in () if compiled else denoiser.named_modules():
            if type(module) is not Attention or type(module.processor) is not AttnProcessor2_0:
                continue
            _replace(stack, module, _direct(module))
            if name.rpartition(".")[2] == "attn2" and not module.norm_cross:  # else its input is new in each step
                for layer in (module.to_k, module.to_v):
                    _replace(stack, layer, _kept(layer.forward))
        yield


def _replace(stack: ExitStack, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let ``module`` compute ``forward`` until ``stack`` ends, unless something else has replaced it."""
    if "forward" not in vars(module):
        module.forward = forward
        stack.callback(vars(module).pop, "forward", None)


def _direct(attention: nn.Module) -> Callable[..., Tensor]:
    """As ``Attention.forward`` with arguments that its processor takes."""

    def forward(hidden_states: Tensor, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        return attention.processor(attention, hidden_states, *args, **kwargs)  # type: ignore[operator, no-any-return]

    return forward


def _kept(compute: Map) -> Map:
    """``compute``, called again only for another tensor or in another precision."""
    last: tuple[Tensor | None, torch.dtype | None, Tensor | None] = None, None, None

    def forward(states: Tensor) -> Tensor:
        nonlocal last
        precision = _autocast(states)
        given, computed_in, output = last
        if output is None or given is not states or computed_in != precision:
            output = compute(states)
            last = states, precision, output
        return output

    return forward


def _autocast(states: Tensor) -> torch.dtype | None:
    """The type that autocast computes in now on the tensor's device; None without it."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
