"""Prompts to ``input_ids`` to ``encoder_hidden_states``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


ENCODE_BATCH = 64
"""Prompts that are encoded at once where many are."""


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return ``input_ids`` (B, L), padded to ``model_max_length``; warn of prompts that are cut off."""
    length = tokenizer.model_max_length
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    for prompt in prompts:
        # One token per character is the worst case, so short prompts need no second look.
        if len(prompt) > length - 2 and (count := len(tokenizer(prompt).input_ids)) > length:
            warnings.warn(
                f"The prompt {prompt!r} has {count} tokens; the text encoder reads {length} and ignores the rest.",
                stacklevel=2,
            )
    return ids


def encode(text_encoder: CLIPTextModel, input_ids: Tensor) -> Tensor:
    """Return the states that the UNet attends to, ``encoder_hidden_states`` (B, L, D), of ``input_ids`` (B, L)."""
    return text_encoder(input_ids.to(text_encoder.device)).last_hidden_state


def residual_stream(text_encoder: CLIPTextModel, input_ids: Tensor, layer: int = -1) -> Tensor:
    """Output (n, L, D), float32, of ``layer`` (default: the last) for ``input_ids`` (n, L), before any final norm."""
    number = layer + 1 if layer >= 0 else layer  # the first of the hidden states are the embeddings
    parts = [
        text_encoder(part.to(text_encoder.device), output_hidden_states=True).hidden_states[number].float()
        for part in input_ids.split(ENCODE_BATCH)
    ]
    return torch.cat(parts)


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """``tokenize`` and ``encode`` together: (B, L, D)."""
    return encode(text_encoder, tokenize(tokenizer, prompts))
