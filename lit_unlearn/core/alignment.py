"""Aligns the token positions of an edit prompt and its target prompt, and selects the positions to edit.

Edit and target prompts come in pairs that differ only in the concept. The concept can have a different number of tokens
in the two prompts, and then everything after it is shifted:

    position     0     1     2     3     4     5     6       7     8
    edit        BOS    a   photo  of   blue   jay  flying   EOS   EOS
    target      BOS    a   photo  of  pigeon flying EOS     EOS   EOS

    edit         0     1     2     3     4     5     6       7     8
    maps to      0     1     2     3     4     4     5       6     7
                |------ prefix ------|-- concept -|suffix|-- EOS, padding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Positions = Literal["all", "no_bos", "content", "eot"]


def align_tokens(
    edit_ids: Sequence[int], target_ids: Sequence[int], eos_token_id: int, begins: bool = True
) -> list[int]:
    """Give, for every position of the edit prompt, the position of the target prompt whose key or value it should take.

    The shared beginning and the shared end of the two texts map one to one. The concept lies between them: its first
    token maps to the target's first, its last token to the target's last, and the tokens between in proportion. A
    concept of a single token maps to the target's last token, which has seen the whole target concept. If the target
    has no tokens in place of the concept (``a blue dog`` and ``a dog``), the concept's tokens take the token before the
    gap. EOS maps to EOS. Padding maps to the padding at the same distance from EOS, or to the last position if the
    target has less padding.

    Args:
        edit_ids: Token ids of the edit prompt, with or without BOS, EOS and padding.
        target_ids: Token ids of the target prompt, in the same form.
        eos_token_id: Ends the text at its first occurrence, whether the tokenizer pads with it (SD 1.x) or with
            another id (SD 2.x). Without EOS the whole sequence is text.
        begins: Whether the first position holds a BOS, which never ends a text, even if it has the same id.

    Returns:
        One position in ``target_ids`` for each of ``edit_ids``; the positions never decrease.

    Raises:
        ValueError: A sequence is empty.
    """
    edit, target = [int(token) for token in edit_ids], [int(token) for token in target_ids]
    if not edit or not target:
        raise ValueError(f"edit_ids has {len(edit)} and target_ids {len(target)} tokens; both need at least one.")
    edit_end, target_end = (_text_length(ids, eos_token_id, begins) for ids in (edit, target))
    shortest = min(edit_end, target_end)
    prefix = 0
    while prefix < shortest and edit[prefix] == target[prefix]:
        prefix += 1
    suffix = 0
    while suffix < shortest - prefix and edit[edit_end - 1 - suffix] == target[target_end - 1 - suffix]:
        suffix += 1

    span = _spread(edit_end - suffix - prefix, target_end - suffix - prefix)
    positions = list(range(prefix))
    positions += [max(prefix + offset, 0) for offset in span]
    positions += range(target_end - suffix, target_end)
    positions += [min(target_end + offset, len(target) - 1) for offset in range(len(edit) - edit_end)]
    return positions


def from_first_difference(edit_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Positions (n, L), bool, from the first token on in which an edit prompt differs from its target prompt.

    A text encoder that reads from left to right gives both prompts the same states before it, so these have nothing of
    the concept.

    Args:
        edit_ids: Token ids of the edit prompts, (n, L).
        target_ids: Token ids of their target prompts, (n, L).
    """
    return (edit_ids != target_ids).cumsum(1) > 0


def positions_mask(ids: Sequence[int] | Tensor, eos_token_id: int, which: Positions, begins: bool = True) -> Tensor:
    """Return the mask of the positions that are edited.

    Args:
        ids: Token ids, (T,) or (B, T).
        eos_token_id: Ends the text at its first occurrence after BOS; without it everything except BOS is content.
        which: ``all`` positions; ``no_bos``, all except BOS, which is the same in every prompt; ``content``, the text
            between BOS and the first EOS; ``eot``, the first EOS and the padding after it.
        begins: Whether position 0 is BOS.

    Returns:
        Boolean mask of the shape of ``ids``.

    Raises:
        ValueError: Unknown ``which``.
    """
    if which not in get_args(Positions):
        raise ValueError(f"which={which!r} is unknown; choose one of {', '.join(get_args(Positions))}.")
    ids = torch.as_tensor(ids)
    after_bos = torch.ones_like(ids, dtype=torch.bool)
    after_bos[..., : int(begins)] = False
    ended = ((ids == eos_token_id) & after_bos).cumsum(-1) > 0
    return {"all": torch.ones_like(after_bos), "no_bos": after_bos, "content": after_bos & ~ended, "eot": ended}[which]


def _text_length(ids: list[int], eos_token_id: int, begins: bool) -> int:
    """Number of positions before the first EOS."""
    return ids.index(eos_token_id, int(begins)) if eos_token_id in ids[int(begins) :] else len(ids)


def _spread(length: int, target_length: int) -> list[int]:
    """Map ``length`` positions evenly to ``target_length`` positions; -1 is the position before the target."""
    if target_length == 0:
        return [-1] * length
    if length == 1:
        return [target_length - 1]
    # Integer arithmetic rounds halves up; round() would round them to even and could map neighbours unevenly.
    return [(2 * i * (target_length - 1) + length - 1) // (2 * (length - 1)) for i in range(length)]
