"""Finds the tokens of a prompt that refer to a concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_unlearn.core.alignment import positions_mask
from lit_unlearn.diffusion.prompts import expand_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Padding = Literal["first_eot", "all_eot"]


def names_mask(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    occurrences: Callable[[str], Sequence[tuple[int, int]]],
    length: int | None = None,
) -> Tensor:
    """Which tokens of each prompt stand for what ``occurrences`` finds in its text.

    Args:
        tokenizer: Byte-pair tokenizer that knows where in a text its tokens stand.
        prompts: B texts.
        occurrences: Places in a text: of each the first character and the one behind its last.
        length: Number of tokens L; None takes the tokenizer's ``model_max_length``.

    Returns:
        (B, L) bool, every token that has a character of such a place; all false for a prompt without any.
    """
    length = tokenizer.model_max_length if length is None else length
    texts = expand_words(tokenizer, prompts)
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_offsets_mapping=True,
    )
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (text, offsets) in enumerate(zip(texts, encoded.offset_mapping, strict=True)):
        for start, end in occurrences(text):
            for position, (first, behind) in enumerate(offsets):
                if first < end and start < behind:  # a special token stands nowhere, from 0 to 0
                    mask[row, position] = True
    return mask


def difference_mask(input_ids: Tensor, target_ids: Tensor, eos_token_id: int, begins: bool = True) -> Tensor:
    """Mark the tokens in which each prompt differs from its target: those between their shared beginning and end.

    In a prompt that describes a concept without its name, these tokens refer to the concept.

    Args:
        input_ids: Tokenized edit prompts, (B, L).
        target_ids: Tokenized target prompts, (B, L).
        eos_token_id: Token that ends a prompt.
        begins: Whether every prompt begins with a token of its own.

    Returns:
        (B, L) bool; all false for a prompt whose target only adds words.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    first = int(begins)
    lengths = [positions_mask(ids, eos_token_id, "content", begins).sum(-1).tolist() for ids in (input_ids, target_ids)]
    for row, (length, target_length) in enumerate(zip(*lengths, strict=True)):
        text = input_ids[row, first : first + length].tolist()
        target = target_ids[row, first : first + target_length].tolist()
        shortest = min(length, target_length)
        prefix = next((i for i in range(shortest) if text[i] != target[i]), shortest)
        rest = shortest - prefix
        suffix = next((i for i in range(rest) if text[-1 - i] != target[-1 - i]), rest)
        mask[row, first + prefix : first + length - suffix] = True
    return mask


def eot_mask(input_ids: Tensor, eos_token_id: int, padding: Padding = "first_eot", begins: bool = True) -> Tensor:
    """Mark the end of the text in each prompt, (B, L) bool.

    Args:
        input_ids: Tokenized prompts, (B, L).
        eos_token_id: The end-of-text token.
        padding: ``first_eot``: only the first one, with any padding token. ``all_eot``: every one of them. Stable
            Diffusion 2.x pads with another token, so both are the same there; 1.x pads with the end-of-text token
            itself, so ``all_eot`` marks all of the padding.
        begins: Whether every prompt begins with a token of its own.
    """
    eot = input_ids == eos_token_id
    if begins:
        eot[:, 0] = False  # the first token begins the text, and may have the same id
    return eot if padding == "all_eot" else eot & (eot.cumsum(-1) == 1)
