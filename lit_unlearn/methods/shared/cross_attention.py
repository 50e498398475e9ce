"""Shared code of the closed forms that map text states to new values in the UNet's cross-attention (UCE, SPEED).

The inputs of all ``attn2.to_k`` and ``attn2.to_v`` are the same, the text encoder's states, so they are gathered once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.shared.editor import DiffusionEditor


def select_keys_and_values(method: DiffusionEditor, names: Sequence[str]) -> list[str]:
    """Weights of ``attn2.to_k`` and ``attn2.to_v`` that the pattern of ``method`` selects among ``names``.

    Raises:
        ValueError: It selects another weight.
    """
    why = ": this method edits only weights of attn2.to_k and attn2.to_v; choose xattn-kv or a pattern within it."
    return method.select_only(names, lambda name: name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")), why)


@torch.no_grad()
def text_states(pipeline: Pipeline, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``input_ids`` (n, L) and the states (n, L, D), float32, of ``prompts``, the keys of all edited layers."""
    tokens = pipeline.tokenize(prompts)
    return tokens.ids[0], pipeline.encode_many(tokens).states.float()
