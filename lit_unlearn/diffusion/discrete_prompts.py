"""Prompts made of chosen tokens: finds the tokens that may be chosen, and converts chosen tokens to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_unlearn.diffusion.prompts import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def whole_words(
    tokenizer: PreTrainedTokenizerBase, forbidden: Callable[[str], object] | None = None, phrases: Sequence[str] = ()
) -> Tensor:
    """Tokens that a person can type as words of a prompt: the text of each one is tokenized to the same token again.

    So any sequence of them, joined by spaces, is tokenized to that sequence. Special tokens and parts of words are not
    included.

    Args:
        tokenizer: Byte-pair tokenizer whose words end in ``</w>``, or unigram tokenizer whose words begin with ``▁``.
        forbidden: Returns whether a word should be left out.
        phrases: Texts whose tokens should all be left out.

    Returns:
        Numbers (A,) of the tokens, ascending.

    Raises:
        ValueError: No token is left.
    """
    left_out = {*tokenizer.all_special_ids}
    for ids in token_ids(tokenizer, phrases):
        left_out |= set(ids)
    words = {
        number: word
        for token, number in tokenizer.get_vocab().items()
        if (word := _word(token)) and number not in left_out
    }
    found = []
    if words:
        read = token_ids(tokenizer, list(words.values()))
        found = [number for number, ids in zip(words, read, strict=True) if ids == [number]]
    found = sorted(number for number in found if forbidden is None or not forbidden(words[number]))
    if not found:
        raise ValueError("The tokenizer has no token that is a whole word and may be chosen: forbid fewer words.")
    return torch.tensor(found)


def shared_words(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    forbidden: Callable[[str], object] | None = None,
    phrases: Sequence[str] = (),
) -> Tensor:
    """The words of ``whole_words`` that every tokenizer reads as one token.

    So a searched prompt means the same places to all text encoders, and can be typed.

    Args:
        tokenizers: E tokenizers, each as for ``whole_words``.
        forbidden: As for ``whole_words``.
        phrases: As for ``whole_words``, for each of the tokenizers.

    Returns:
        Numbers (A, E) of each word's token in each tokenizer, ascending in the first.

    Raises:
        ValueError: No word is left.
    """
    first, *others = tokenizers
    allowed = whole_words(first, forbidden, phrases)
    columns, kept = [allowed], torch.ones(len(allowed), dtype=torch.bool)
    words = [words_of(first, [number]) for number in allowed.tolist()]
    for tokenizer in others:
        left_out = {*tokenizer.all_special_ids}.union(*token_ids(tokenizer, phrases))
        read = token_ids(tokenizer, words)
        kept &= torch.tensor([len(ids) == 1 and ids[0] not in left_out for ids in read])
        columns.append(torch.tensor([ids[0] if ids else -1 for ids in read]))
    found = torch.stack(columns, dim=1)[kept]
    if not len(found):
        raise ValueError("No word that may be chosen is one token for all tokenizers: forbid fewer words.")
    return found


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens from ``whole_words``."""
    return " ".join(map(_word, tokenizer.convert_ids_to_tokens(list(ids))))


def _word(token: str) -> str:
    """The word that a token of a vocabulary stands for; empty if it is a part of a word."""
    return token.removesuffix("</w>") if token.endswith("</w>") else token[1:] if token.startswith("▁") else ""
