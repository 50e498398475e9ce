"""Selects the token states of a phrase that a cross-attention edit changes, and the states of its guide to use instead.

A phrase ends at the first end-of-text token, whether the tokenizer pads with that token (SD 1.x) or with another one
(SD 2.x). The token before it is the *last subject token*: the encoder is causal, so it has seen the whole phrase.

    position        0     1     2     3     4     5     6
    phrase         BOS  soccer ball  EOS   pad   pad   pad      last subject token 2
    guide          BOS   cat   EOS   pad   pad   pad   pad      last subject token 1
    last_subject                1
    from_subject                1     2     3     4     5       guide's positions, as far as both reach
    all                   1     1     2     3     4     5       aligned as in ``alignment.align_tokens``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_unlearn.core.alignment import align_tokens, positions_mask

SubjectTokens = Literal["last_subject", "from_subject", "all"]


def last_subject_token(input_ids: Tensor, eos_token_id: int, begins: bool = True) -> Tensor:
    """Position (n,) of the last token before the first end-of-text token of ``input_ids`` (n, L).

    For an empty phrase it is 0, the BOS token, or the end-of-text token of a tokenizer without BOS (``begins`` is
    false); for a phrase without an end-of-text token it is the last position.
    """
    ended = positions_mask(input_ids, eos_token_id, "eot", begins)
    length = torch.where(ended.any(-1), ended.int().argmax(-1), input_ids.shape[-1])
    return (length - 1).clamp(min=0)


def subject_positions(
    phrase_ids: Tensor, guide_ids: Sequence[Tensor], eos_token_id: int, which: SubjectTokens, begins: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Find the edited states of ``n`` phrases and the states of their guides.

    Args:
        phrase_ids: Token ids of the phrases, (n, L).
        guide_ids: Token ids of the guides, (n, L) each; a phrase may have several guides.
        eos_token_id: Ends a text at its first occurrence after BOS.
        which: ``last_subject``, the last token of the phrase (UCE's code of 2025); ``from_subject``, the positions from
            that token to the end of the window, as many as remain in the longest of phrase and guides (UCE's code of
            2023); ``all`` positions except BOS, each with the guide's position that is aligned with it.
        begins: Whether every text begins with BOS.

    Returns:
        Rows (m,) of ``phrase_ids``, positions (m,) in these phrases, and positions (m,) in each of the guides.

    Raises:
        ValueError: Unknown ``which``.
    """
    if which not in get_args(SubjectTokens):
        raise ValueError(f"tokens={which!r} is unknown; choose one of {', '.join(get_args(SubjectTokens))}.")
    count, length = phrase_ids.shape
    if which == "all":
        rows = torch.arange(count).repeat_interleave(length - int(begins))
        positions = torch.arange(int(begins), length).repeat(count)
        return rows, positions, [_aligned(phrase_ids, ids, eos_token_id, begins)[rows, positions] for ids in guide_ids]
    start = last_subject_token(phrase_ids, eos_token_id, begins)
    guide_start = [last_subject_token(ids, eos_token_id, begins) for ids in guide_ids]
    if which == "last_subject":
        return torch.arange(count), start, guide_start
    reach = length - torch.stack([start, *guide_start]).amax(0)  # (n,), at least 1
    rows = torch.arange(count).repeat_interleave(reach)
    offset = torch.cat([torch.arange(int(number)) for number in reach])
    return rows, start[rows] + offset, [first[rows] + offset for first in guide_start]


def _aligned(phrase_ids: Tensor, guide_ids: Tensor, eos_token_id: int, begins: bool) -> Tensor:
    """For every position of each phrase, the aligned position of its guide, (n, L)."""
    pairs = zip(phrase_ids.tolist(), guide_ids.tolist(), strict=True)
    return torch.tensor([align_tokens(phrase, guide, eos_token_id, begins) for phrase, guide in pairs])
