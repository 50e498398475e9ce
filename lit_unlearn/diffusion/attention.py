"""Records the cross-attention of a UNet, from each pixel to the tokens of the prompt, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class RecordingProcessor:
    """Attention with an explicit softmax whose probabilities are recorded; otherwise as diffusers' processors.

    The fused kernels that diffusers uses by default never compute these probabilities explicitly.

    Args:
        name: Name of the layer.
        record: Dictionary that stores its probabilities (B, heads, pixels, L).
    """

    def __init__(self, name: str, record: dict[str, Tensor]) -> None:
        self.name, self.record = name, record

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` (B, pixels, C), or (B, C, H, W), to ``encoder_hidden_states`` (B, L, D)."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).mT
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross is not None:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        value = heads(attn.to_v(encoder_hidden_states))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        scores = query @ key.mT * attn.scale
        if attention_mask is not None:
            batch, length = encoder_hidden_states.shape[:2]
            mask = attn.prepare_attention_mask(attention_mask, length, batch)  # added to the scores
            scores = scores + mask.view(batch, attn.heads, -1, length)
        if attn.upcast_softmax:
            scores = scores.float()
        probabilities = self.record[self.name] = scores.softmax(-1)

        hidden_states = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:  # the projection, then dropout
            hidden_states = layer(hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.mT.reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


@contextmanager
def record_attention(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the cross-attention (``attn2``) of every layer at its latest call, with gradients.

    Args:
        unet: A UNet whose cross-attention uses diffusers' own processors, fused or not.

    Yields:
        Probabilities (B, heads, pixels, L) by names of layers, in the order of the calls; rows sum to one.

    Raises:
        ValueError: The UNet has no ``attn2``, or a processor has its own weights (an adapter).
    """
    layers: dict[str, Attention] = {
        name: module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn2"
    }  # type: ignore[assignment]
    if not layers:
        raise ValueError("The UNet has no layer named attn2: its attention to the prompt cannot be recorded.")
    before = {name: attn.processor for name, attn in layers.items()}
    for name, processor in before.items():
        if isinstance(processor, nn.Module):
            raise ValueError(f"{name} attends through {type(processor).__name__}: unload the adapter to record it.")
    record: dict[str, Tensor] = {}
    try:
        for name, attn in layers.items():
            attn.set_processor(RecordingProcessor(name, record))
        yield record
    finally:
        for name, attn in layers.items():
            attn.set_processor(before[name])
