"""Prompts to ``input_ids`` to ``encoder_hidden_states``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


ENCODE_BATCH = 64
"""Prompts that are encoded at once where many are."""


def expand_words(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[str]:
    """``texts`` with every word that was learned as several vectors written as all its tokens, as diffusers does it."""
    added = tokenizer.added_tokens_encoder
    if not any(f"{token}_1" in added for token in added):
        return list(texts)
    from diffusers.loaders import TextualInversionLoaderMixin

    expanded: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
    return expanded


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Numbers of the tokens of each text, all of them, without those that begin and end a prompt."""
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
    """What text encoders read of prompts, which can be known before they are loaded.

    Attributes:
        tokenizers: Those of the text encoders.
    """

    tokenizers: tuple[CLIPTokenizer, ...]

    def ids(self, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """For each prompt the tokens that each text encoder reads, without those that begin and end it."""
        read = [
            [tuple(ids[: tokenizer.model_max_length - 2]) for ids in token_ids(tokenizer, prompts)]
            for tokenizer in self.tokenizers
        ]
        return list(zip(*read, strict=True))

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """What is read of each prompt by all text encoders: the beginning of it, where it is cut."""
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
    """All beginnings of ``text`` that end no word in its middle, where words have spaces between them."""
    spaced = [letter.isalnum() and letter < "\u0590" for letter in text]  # Latin, Greek, Cyrillic, Armenian
    return [text[:end] for end in range(len(text) + 1) if not (0 < end < len(text) and all(spaced[end - 1 : end + 1]))]


_WARNED_OF: set[tuple[str, int]] = set()


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
