"""Finds the tokens of a prompt that refer to a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_unlearn.core.alignment import positions_mask

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Padding = Literal["first_eot", "all_eot"]


def names_mask(tokenizer: CLIPTokenizer, input_ids: Tensor, names: Sequence[str]) -> Tensor:
    """Mark the tokens of every occurrence of one of ``names`` in each prompt.

    Names are compared as tokens, so letter case does not matter, and only whole words count: an unknown word that the
    tokenizer splits into ``b`` and ``rain`` does not contain the name ``rain``.

    Args:
        tokenizer: Byte-pair tokenizer whose words end in ``</w>``.
        input_ids: Tokenized prompts, (B, L).
        names: Words or phrases.

    Returns:
        (B, L) bool; all false for a prompt without a name.
    """
    phrases = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
    content = positions_mask(input_ids, tokenizer.eos_token_id, "content").tolist()
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate(input_ids.tolist()):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        for phrase in phrases:
            for start in range(1, len(ids) - len(phrase) + 1):
                span = slice(start, start + len(phrase))
                begins = start == 1 or tokens[start - 1].endswith("</w>")
                if begins and ids[span] == phrase and all(content[row][span]):
                    mask[row, span] = True
    return mask


def difference_mask(input_ids: Tensor, target_ids: Tensor, eos_token_id: int) -> Tensor:
    """Mark the tokens in which each prompt differs from its target: those between their shared beginning and end.

    In a prompt that describes a concept without its name, these tokens refer to the concept.

    Args:
        input_ids: Tokenized edit prompts, (B, L).
        target_ids: Tokenized target prompts, (B, L).
        eos_token_id: Token that ends a prompt.

    Returns:
        (B, L) bool; all false for a prompt whose target only adds words.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    lengths = [positions_mask(ids, eos_token_id, "content").sum(-1).tolist() for ids in (input_ids, target_ids)]
    for row, (length, target_length) in enumerate(zip(*lengths, strict=True)):
        text = input_ids[row, 1 : 1 + length].tolist()
        target = target_ids[row, 1 : 1 + target_length].tolist()
        shortest = min(length, target_length)
        prefix = next((i for i in range(shortest) if text[i] != target[i]), shortest)
        rest = shortest - prefix
        suffix = next((i for i in range(rest) if text[-1 - i] != target[-1 - i]), rest)
        mask[row, 1 + prefix : 1 + length - suffix] = True
    return mask


def eot_mask(input_ids: Tensor, eos_token_id: int, padding: Padding = "first_eot") -> Tensor:
    """Mark the end of the text in each prompt, (B, L) bool.

    Args:
        input_ids: Tokenized prompts, (B, L).
        eos_token_id: The end-of-text token.
        padding: ``first_eot``: only the first one, with any padding token. ``all_eot``: every one of them. Stable
            Diffusion 2.x pads with another token, so both are the same there; 1.x pads with the end-of-text token
            itself, so ``all_eot`` marks all of the padding.
    """
    eot = input_ids == eos_token_id
    eot[:, 0] = False  # the first token begins the text, and may have the same id
    return eot if padding == "all_eot" else eot & (eot.cumsum(-1) == 1)
