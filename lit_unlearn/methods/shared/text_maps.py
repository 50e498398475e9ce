"""Shared code of the closed forms that map text to new outputs in the first linear maps that read it (UCE, SPEED).

All maps of a way have the same inputs, the text encoders' outputs, so these are gathered once; see ``text_ways``. A
map's bias is no part of its values: ``V1 = W K1*``, and the bias is added to both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.subject_tokens import SubjectTokens, subject_positions
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text_ways import way_of
from lit_unlearn.methods.shared.editor import DiffusionEditor


def select_first_maps(method: DiffusionEditor, names: Sequence[str]) -> list[str]:
    """Weights of the first linear maps on text that the pattern of ``method`` selects among ``names``.

    Raises:
        ValueError: It selects another weight.
    """
    known = "attn2.to_k and attn2.to_v of a UNet, and context and pooled embedders"
    why = f": this method edits only the maps that read text first, {known}; choose xattn-kv, context or a part of it."
    return method.select_only(names, lambda name: way_of(name) is not None, why)


def select_keys_and_values(method: DiffusionEditor, names: Sequence[str]) -> list[str]:
    """Weights of ``attn2.to_k`` and ``attn2.to_v`` that the pattern of ``method`` selects among ``names``.

    Raises:
        ValueError: It selects another weight.
    """
    why = ": this method edits only weights of attn2.to_k and attn2.to_v; choose xattn-kv or a pattern within it."
    return method.select_only(names, lambda name: name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")), why)


def by_way(names: Sequence[str]) -> dict[str, list[str]]:
    """The weights ``names``, which ``select_first_maps`` allows, by the way that they read, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(str(way_of(name)), []).append(name)
    return found


@dataclass(frozen=True)
class TextKeys:
    """Prompts as the maps of a way read them.

    Attributes:
        states: The maps' inputs, (n, L, d_in), float32.
        ids: ``input_ids`` (n, L_e) of each text encoder whose positions follow one another in ``states``; empty if a
            prompt has one vector that is no token's.
    """

    states: Tensor
    ids: tuple[Tensor, ...] = ()

    def at(self, rows: Tensor, places: Tensor) -> Tensor:
        """The inputs (m, d_in) at positions ``places`` (m,) of the prompts ``rows`` (m,)."""
        return self.states[rows, places]


@torch.no_grad()
def text_keys(pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, TextKeys]:
    """``prompts`` as each way's maps read them, encoded once."""
    tokens = pipeline.tokenize(prompts)
    inputs = pipeline.first_inputs(pipeline.encode_many(tokens))
    ids = tuple(tokens.ids[number] for number in pipeline.token_order)
    return {way: TextKeys(states.float(), ids if way == "tokens" else ()) for way, states in inputs.items()}


def subject_places(
    pipeline: Pipeline, phrases: TextKeys, guides: Sequence[TextKeys], which: SubjectTokens
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows (m,) and positions (m,) of the edited states of ``phrases``, and positions (m,) in each of the guides.

    They are those of ``subject_positions`` for each text encoder in turn; the only one of a pooled vector.
    """
    if not phrases.ids:
        rows = torch.arange(len(phrases.states))
        zeros = torch.zeros_like(rows)
        return rows, zeros, [zeros for _ in guides]
    parts, start = [], 0
    for number, (text, ids) in enumerate(zip(pipeline.token_order, phrases.ids, strict=True)):
        encoder, of_guides = pipeline.texts[text], [guide.ids[number] for guide in guides]
        rows, places, guide_places = subject_positions(ids, of_guides, encoder.eos, which, encoder.begins)
        parts.append((rows, places + start, *(found + start for found in guide_places)))
        start += ids.shape[1]
    rows, places, *guide_places = (torch.cat(found) for found in zip(*parts, strict=True))
    return rows, places, guide_places


def retained_inputs(
    pipeline: Pipeline,
    ways: Sequence[str],
    prompts: Sequence[str],
    empty_weight: int = 0,
    last_subject: bool = False,
) -> dict[str, Retained]:
    """What is retained on each way: the sum of k kᵀ over the inputs at ``prompts``, computed in batches.

    Args:
        pipeline: The pipeline.
        ways: Names of ways.
        prompts: Prompts whose outputs should not change; for none, nothing is retained.
        empty_weight: How often the empty prompt counts.
        last_subject: Whether only the state of each prompt's last token is retained.
    """
    if not prompts:
        return {way: Retained() for way in ways}
    moments: dict[str, list[Tensor]] = {way: [] for way in ways}
    counts, longest = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    once = [*prompts, *([""] if empty_weight == 1 else [])]
    batches = [(once[start : start + ENCODE_BATCH], 1) for start in range(0, len(once), ENCODE_BATCH)]
    for batch, weight in [*batches, *([([""], empty_weight)] if empty_weight > 1 else [])]:
        found = text_keys(pipeline, batch)
        for way in ways:
            states = found[way].states
            if last_subject:
                states = found[way].at(*subject_places(pipeline, found[way], [], "last_subject")[:2])
            keys = states.flatten(0, -2)
            moments[way].append(weight * second_moment(keys))
            counts[way], longest[way] = counts[way] + weight * len(keys), max(longest[way], largest_norm(keys))
    return {
        way: Retained(
            torch.stack(moments[way]).sum(0).cpu(), counts[way], prompts=len(prompts), largest_norm=longest[way]
        )
        for way in ways
    }
