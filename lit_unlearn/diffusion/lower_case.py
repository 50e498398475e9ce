"""Tokenizers of pipelines that make prompts lower case before they read them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lower(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let ``tokenizer`` make what it reads lower case; the places of its tokens in a text stay known."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    own = [] if backend.normalizer is None else [backend.normalizer]
    tokenizer.before_lowering = own  # type: ignore[attr-defined]
    backend.normalizer = Sequence([Lowercase(), *own])


def as_stored(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """``tokenizer`` as it is in its folder: a pipeline of diffusers makes lower case itself."""
    if not hasattr(tokenizer, "before_lowering"):
        return tokenizer
    stored = copy.deepcopy(tokenizer)
    backend: Any = stored.backend_tokenizer  # type: ignore[attr-defined]
    backend.normalizer = next(iter(tokenizer.before_lowering), None)
    return stored
