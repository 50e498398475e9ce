"""Counts the memory of computations without doing them: they run on the meta device, on shapes without values.

    pipeline = DescribedModel.find("flux1_dev").pipeline(torch.bfloat16)
    encode_bytes(pipeline, 64)          # what an encode of 64 prompts needs beside the weights
    predict_bytes(pipeline, 2)          # one call of the denoiser
    descent_bytes(pipeline, 1, names)   # with the gradients of some weights

What is counted is every tensor that PyTorch makes, as long as something holds it. Fused attention is counted as such,
as it runs on GPUs and processors. Scratch memory within a kernel (of convolutions, for example), the allocator's
rounding and the libraries themselves are not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.text import Tokens

META = torch.device("meta")
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _FusedAttention(TorchFunctionMode):
    """Within it, attention of tensors without values is one kernel: on that device PyTorch would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(ATTENTION, args, strict=False)), **kwargs}
        query, key, value = (given[name] for name in ATTENTION[:3])
        options = {"attn_mask": given.get("attn_mask"), "scale": given.get("scale")}
        fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, bool(given.get("is_causal")), **options)[0]


class _Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations make in it: at most at once, as ``peak``."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0  # the total may count some that are gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if self.total > self.peak:
            self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
            self.total = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.total)
        return result

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self.storages and storage._cdata not in self.known:
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.total += storage.nbytes()


def peak_bytes(modules: Iterable[nn.Module], call: Callable[[], object]) -> int:
    """Bytes of all tensors that ``call`` holds at most at once, beside the weights of ``modules``."""
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held = _Held(known)
    with _FusedAttention(), held:
        call()
    return held.peak


def module_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def tokens_of(pipeline: Pipeline, count: int) -> Tokens:
    """Tokens of ``count`` prompts of the usual lengths."""
    return Tokens(tuple(torch.zeros(count, text.length, dtype=torch.long, device=META) for text in pipeline.texts))


def condition_of(pipeline: Pipeline, count: int) -> Condition:
    """The condition of ``count`` prompts."""
    with torch.no_grad(), _FusedAttention():
        return pipeline.condition(tokens_of(pipeline, count))


@torch.no_grad()
def encode_bytes(pipeline: Pipeline, count: int, part: str | None = None) -> int:
    """Bytes that an encode of ``count`` prompts holds beside the weights; with ``part`` that text encoder alone."""
    tokens = tokens_of(pipeline, count)
    if part is None:
        return peak_bytes(pipeline.parts.values(), lambda: pipeline.condition(tokens))
    (number,) = (place for place, text in enumerate(pipeline.texts) if text.part == part)
    text = pipeline.texts[number]
    return peak_bytes([text.model], lambda: text.read(tokens.ids[number]))


@torch.no_grad()
def predict_bytes(pipeline: Pipeline, count: int) -> int:
    """Bytes that a call of the denoiser with ``count`` latents holds beside the weights."""
    call = _prediction(pipeline, count, condition_of(pipeline, count))
    return peak_bytes(pipeline.parts.values(), call)


@torch.no_grad()
def decode_bytes(pipeline: Pipeline, count: int) -> int:
    """Bytes that decoding ``count`` latents holds beside the weights."""
    vae: Any = pipeline.vae
    latents = torch.empty(count, *pipeline.latent_shape, dtype=pipeline.dtype, device=META)
    return peak_bytes(pipeline.parts.values(), lambda: vae.decode(latents))


def descent_bytes(pipeline: Pipeline, count: int, trained: Collection[str], through_text: bool) -> int:
    """Bytes that a prediction for ``count`` latents and its backward pass hold beside the weights.

    Args:
        pipeline: The pipeline.
        count: Number of latents.
        trained: Full names of the weights whose gradients are computed; these count.
        through_text: Whether the gradient also flows through the text encoders.
    """
    parameters = pipeline.named_parameters()
    condition = None if through_text else condition_of(pipeline, count)
    tokens = tokens_of(pipeline, count)

    def step() -> None:
        read = pipeline.condition(tokens) if condition is None else condition
        _prediction(pipeline, count, read)().float().square().mean().backward()  # type: ignore[no-untyped-call]

    try:
        for name in trained:
            parameters[name].requires_grad_(True)
        return peak_bytes(pipeline.parts.values(), step)
    finally:
        for name in trained:
            parameters[name].requires_grad_(False).grad = None


def _prediction(pipeline: Pipeline, count: int, condition: Condition) -> Callable[[], Tensor]:
    x_t = torch.empty(count, *pipeline.latent_shape, dtype=pipeline.dtype, device=META)
    return lambda: pipeline.predict(x_t, torch.zeros((), device=META), condition)


__all__ = [
    "condition_of",
    "decode_bytes",
    "descent_bytes",
    "encode_bytes",
    "module_bytes",
    "peak_bytes",
    "predict_bytes",
    "tokens_of",
]
