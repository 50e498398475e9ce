"""Turns prompts into ``input_ids``, and these into ``encoder_hidden_states``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


ENCODE_BATCH = 64
"""Batch size for encoding many prompts."""


def expand_words(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[str]:
    """``texts`` in which a word that was learned as several vectors is replaced by all its tokens, as in diffusers."""
    added = tokenizer.added_tokens_encoder
    if not any(f"{token}_1" in added for token in added):
        return list(texts)
    from diffusers.loaders import TextualInversionLoaderMixin

    expanded: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
    return expanded


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of all tokens of each text, without the tokens that begin and end a prompt."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(expand_words(tokenizer, texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return ``input_ids`` (B, L), padded to ``model_max_length``; warn of prompts that are cut off."""
    reader = PromptReader((tokenizer,))
    reader.warn_of_cuts(prompts)
    return tokenizer(
        expand_words(tokenizer, prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts as the text encoders do, without loading them.

    Attributes:
        tokenizers: The tokenizers of the text encoders.
    """

    tokenizers: tuple[CLIPTokenizer, ...]

    def ids(self, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """For each prompt, the ids of the tokens that each text encoder reads, without the begin and end tokens."""
        read = [
            [tuple(ids[: tokenizer.model_max_length - 2]) for ids in token_ids(tokenizer, prompts)]
            for tokenizer in self.tokenizers
        ]
        return list(zip(*read, strict=True))

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The part of each prompt that all text encoders read: if it is cut, only its beginning."""
        found = list(prompts)
        for tokenizer in self.tokenizers:
            room = tokenizer.model_max_length - 2
            for place, ids in enumerate(token_ids(tokenizer, prompts)):
                if len(ids) > room:
                    beginnings = _beginnings(prompts[place])
                    counts = [len(part) for part in token_ids(tokenizer, beginnings)]
                    fitting = [text for text, count in zip(beginnings, counts, strict=True) if count <= room]
                    found[place] = min(found[place], max(fitting, key=len).rstrip(), key=len)
        return found

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn of each prompt that is cut, once in a process."""
        for tokenizer in self.tokenizers:
            length = tokenizer.model_max_length
            for prompt, ids in zip(prompts, token_ids(tokenizer, prompts), strict=True):
                if (count := len(ids) + 2) > length and (prompt, length) not in _WARNED_OF:
                    from lightning.pytorch.utilities import rank_zero_warn  # slow to import, and rarely needed

                    _WARNED_OF.add((prompt, length))
                    rank_zero_warn(
                        f"The prompt {prompt!r} has {count} tokens; the text encoder reads {length} and ignores the "
                        "rest."
                    )


def _beginnings(text: str) -> list[str]:
    """All beginnings of ``text`` that do not end inside a word, for scripts with spaces between words."""
    spaced = [letter.isalnum() and letter < "\u0590" for letter in text]  # Latin, Greek, Cyrillic, Armenian
    return [text[:end] for end in range(len(text) + 1) if not (0 < end < len(text) and all(spaced[end - 1 : end + 1]))]


_WARNED_OF: set[tuple[str, int]] = set()


def encode(text_encoder: CLIPTextModel, input_ids: Tensor) -> Tensor:
    """Return ``encoder_hidden_states`` (B, L, D), which the UNet attends to, for ``input_ids`` (B, L)."""
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
