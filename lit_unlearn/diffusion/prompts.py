"""Turns prompts into ``input_ids``, and these into ``encoder_hidden_states``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase


ENCODE_BATCH = 64
"""Batch size for encoding many prompts."""


def expand_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """``texts`` in which a word that was learned as several vectors is replaced by all its tokens, as in diffusers."""
    added = tokenizer.added_tokens_encoder
    if not any(f"{token}_1" in added for token in added):
        return list(texts)
    from diffusers.loaders import TextualInversionLoaderMixin

    expanded: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
    return expanded


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of all tokens of each text, without the tokens that begin and end a prompt."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(expand_words(tokenizer, texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the tokens that begin a prompt and of the ones that end it: BOS and EOS of CLIP, only EOS of T5."""
    *begin, end = tokenizer("", verbose=False).input_ids
    return begin, [end]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int | None = None, part: str = "text_encoder"
) -> Tensor:
    """Return ``input_ids`` (B, L), padded to ``length``; warn of prompts that are cut off.

    Args:
        tokenizer: The tokenizer.
        prompts: The prompts.
        length: Number of tokens L; None takes the tokenizer's ``model_max_length``.
        part: Name of the text encoder, for the warning.
    """
    length = tokenizer.model_max_length if length is None else length
    reader = PromptReader((tokenizer,), (length,), (part,))
    reader.warn_of_cuts(prompts)
    return tokenizer(
        expand_words(tokenizer, prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    ).input_ids


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts as the text encoders do, without loading them.

    Attributes:
        tokenizers: The tokenizers of the text encoders.
        lengths: Number of tokens that each text encoder reads; empty for the ``model_max_length`` of each tokenizer.
        parts: Names of the text encoders; empty for a single one.
    """

    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    lengths: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    def _rooms(self) -> Iterator[tuple[PreTrainedTokenizerBase, int]]:
        """Each tokenizer, and the number of tokens that fit beside the ones that begin and end a prompt."""
        for place, tokenizer in enumerate(self.tokenizers):
            length = self.lengths[place] if self.lengths else tokenizer.model_max_length
            yield tokenizer, length - sum(map(len, frame(tokenizer)))

    def ids(self, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """For each prompt, the ids of the tokens that each text encoder reads, without the begin and end tokens."""
        read = [[tuple(ids[:room]) for ids in token_ids(tokenizer, prompts)] for tokenizer, room in self._rooms()]
        return list(zip(*read, strict=True))

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The part of each prompt that all text encoders read: if it is cut, only its beginning."""
        found = list(prompts)
        for tokenizer, room in self._rooms():
            for place, ids in enumerate(token_ids(tokenizer, prompts)):
                if len(ids) > room:
                    beginnings = _beginnings(prompts[place])
                    counts = [len(part) for part in token_ids(tokenizer, beginnings)]
                    fitting = [text for text, count in zip(beginnings, counts, strict=True) if count <= room]
                    found[place] = min(found[place], max(fitting, key=len).rstrip(), key=len)
        return found

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn of each prompt that is cut, once in a process for each text encoder; of more than five, in one line."""
        for place, (tokenizer, room) in enumerate(self._rooms()):
            part = self.parts[place] if self.parts else "text_encoder"
            who = "the text encoder" if part == "text_encoder" else part
            framed = sum(map(len, frame(tokenizer)))
            length = room + framed
            cut = {
                prompt: len(ids) + framed
                for prompt, ids in zip(prompts, token_ids(tokenizer, prompts), strict=True)
                if len(ids) > room and (prompt, part, length) not in _WARNED_OF
            }
            if not cut:
                continue
            from lightning.pytorch.utilities import rank_zero_warn  # slow to import, and rarely needed

            _WARNED_OF.update((prompt, part, length) for prompt in cut)
            if len(cut) <= MOST_WARNINGS:
                for prompt, count in cut.items():
                    rank_zero_warn(
                        f"The prompt {prompt!r} has {count} tokens; {who} reads {length} and ignores the rest."
                    )
            else:
                longest = max(cut, key=cut.__getitem__)
                rank_zero_warn(
                    f"{len(cut)} prompts have more tokens than the {length} that {who} reads; it ignores the rest of "
                    f"each. The longest has {cut[longest]}: {longest!r}."
                )


def _beginnings(text: str) -> list[str]:
    """All beginnings of ``text`` that do not end inside a word, for scripts with spaces between words."""
    spaced = [letter.isalnum() and letter < "\u0590" for letter in text]  # Latin, Greek, Cyrillic, Armenian
    return [text[:end] for end in range(len(text) + 1) if not (0 < end < len(text) and all(spaced[end - 1 : end + 1]))]


MOST_WARNINGS = 5
"""Cut prompts that are warned of one by one."""
_WARNED_OF: set[tuple[str, str, int]] = set()


def encode(text_encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``encoder_hidden_states`` (B, L, D), which the UNet attends to, for ``input_ids`` (B, L).

    Args:
        text_encoder: The text encoder.
        input_ids: The tokens.
        mask: Positions that the encoder itself reads, (B, L) bool; None for all.
    """
    return text_encoder(input_ids.to(text_encoder.device), attention_mask=mask).last_hidden_state


def residual_stream(
    text_encoder: PreTrainedModel, input_ids: Tensor, layer: int = -1, mask: Tensor | None = None
) -> Tensor:
    """Output (n, L, D), float32, of ``layer`` (default: the last) for ``input_ids`` (n, L), before any final norm.

    Args:
        text_encoder: The text encoder.
        input_ids: The tokens.
        layer: Number of the layer, from 0 or, counted from the last, -1.
        mask: As for ``encode``, (n, L).
    """
    number = layer + 1 if layer >= 0 else layer  # the first of the hidden states are the embeddings
    ids = input_ids.split(ENCODE_BATCH)
    masks = [None] * len(ids) if mask is None else mask.split(ENCODE_BATCH)
    parts = [
        _hidden_states(text_encoder, part.to(text_encoder.device), own)[number].float()
        for part, own in zip(ids, masks, strict=True)
    ]
    return torch.cat(parts)


def _hidden_states(text_encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
    """The embeddings and the output of each layer, before any final norm, (n, L, D) each; gradients flow."""
    # Of a T5, transformers gives the last one after the norm.
    norm = getattr(getattr(text_encoder, "encoder", None), "final_layer_norm", None)
    if norm is None:
        found = text_encoder(input_ids, attention_mask=mask, output_hidden_states=True)
        return found.hidden_states  # type: ignore[no-any-return]
    last: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    try:
        *states, _ = text_encoder(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    return [*states, *last]


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """``tokenize`` and ``encode`` together: (B, L, D)."""
    return encode(text_encoder, tokenize(tokenizer, prompts))
