"""Shared code of the closed forms that map text to new outputs in the first linear maps that read it (UCE, SPEED).

All maps of a way have the same inputs, the text encoders' outputs, so these are gathered once; see ``text_ways``. A
map's bias is no part of its values: ``V1 = W K1*``, and the bias is added to both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.subject_tokens import SubjectTokens, last_subject_token, subject_positions
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.diffusion.text_ways import WAYS, way_of
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.devices import for_solving

SORTED_BATCH = 8 * ENCODE_BATCH
"""Number of retained prompts that are sorted by their length together, if they are read up to their last token."""


def select_first_maps(method: DiffusionEditor, names: Sequence[str]) -> list[str]:
    """Weights of the first linear maps on text that the pattern of ``method`` selects among ``names``.

    Raises:
        ValueError: It selects another weight, or maps of which one edit would move the inputs of others.
    """
    known = "attn2.to_k and attn2.to_v of a UNet or of PixArt, and the weights of context and pooled embedders"
    why = f": this method edits only the maps that read text first, {known}; choose xattn-kv, context or a part of it."
    selected = method.select_only(names, lambda name: way_of(name) in method.base.family.ways, why)
    if {"tokens", "projected"} <= (ways := by_way(selected)).keys():
        raise ValueError(
            f"edited_parameters={method.edited_parameters!r} selects {ways['tokens'][0]}, and an edit of it moves what "
            f"{ways['projected'][0]} reads: choose context or xattn-kv, and edit the one after the other."
        )
    return selected


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
    """Prompts as the maps of a way read them; equal prompts share their states.

    Attributes:
        states: The maps' inputs at u distinct prompts, (u, L, d_in), float32. Positions that were not asked for are cut
            off, or not a number if only another prompt has them.
        index: Number of each prompt among the distinct ones, (n,).
        ids: ``input_ids`` (n, L_e) of each text encoder whose positions follow one another in ``states``; empty if a
            prompt has one vector that is no token's.
        mask: Which positions of each prompt the denoiser reads, (n, L) bool; None for all.
    """

    states: Tensor
    index: Tensor
    ids: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def at(self, rows: Tensor, places: Tensor) -> Tensor:
        """The inputs (m, d_in) at positions ``places`` (m,) of the prompts ``rows`` (m,)."""
        return self.states[self.index[rows], places]

    def read(self) -> Tensor:
        """The inputs (m, d_in) at all positions that are read, of one prompt after the other."""
        found = self.states[self.index]
        return found.flatten(0, 1) if self.mask is None else found[self.mask.to(found.device)]


@torch.no_grad()
def text_keys(
    pipeline: Pipeline,
    *lists: Sequence[str],
    ways: Sequence[str] = tuple(WAYS),
    which: SubjectTokens = "all",
) -> list[dict[str, TextKeys]]:
    """Each of the ``lists`` of prompts as each way's maps read them; a prompt is encoded once, wherever it occurs.

    A state of a causal encoder depends only on the tokens up to its position. So for ``last_subject`` the encoders read
    nothing behind the last token of a prompt, which takes a small part of the time; states differ from those of the
    whole window by rounding (3e-6). All positions are read if an encoder reads both directions, or if the pooled vector
    is needed, which is read at the end of the text.

    Args:
        pipeline: The pipeline.
        lists: Lists of prompts.
        ways: Names of the ways that are needed.
        which: The positions that are needed.
    """
    tokens = [pipeline.tokenize(prompts) for prompts in lists]
    numbers: dict[tuple[tuple[int, ...], ...], int] = {}
    index = []
    for part in tokens:
        rows = zip(*([tuple(row) for row in ids.tolist()] for ids in part.ids), strict=True)
        index.append(torch.tensor([numbers.setdefault(row, len(numbers)) for row in rows], dtype=torch.long))
    if not numbers:
        return [{} for _ in lists]
    distinct = Tokens(tuple(torch.tensor(ids) for ids in zip(*numbers, strict=True)))
    inputs = _inputs(pipeline, distinct, ways, which)
    found = []
    for part, places in zip(tokens, index, strict=True):
        ids, mask = tuple(part.ids[number] for number in pipeline.token_order), pipeline.read_positions(part)
        own = {way: (places, *(((), None) if way == "pooled" else (ids, mask))) for way in inputs}
        found.append({way: TextKeys(states, *own[way]) for way, states in inputs.items()})
    return found


def _reads_to_subject(pipeline: Pipeline, ways: Sequence[str], which: SubjectTokens) -> bool:
    """Whether prompts are read up to their last token only."""
    return which == "last_subject" and list(ways) == ["tokens"] and all(text.causal for text in pipeline.texts)


def _inputs(pipeline: Pipeline, tokens: Tokens, ways: Sequence[str], which: SubjectTokens) -> dict[str, Tensor]:
    """The maps' inputs (u, L, d_in) at u prompts, float32; of ``last_subject`` only the positions up to it."""
    texts, length = pipeline.texts, max(ids.shape[1] for ids in tokens.ids)
    needed = torch.full((len(tokens),), length)
    if _reads_to_subject(pipeline, ways, which):
        last = [last_subject_token(ids, text.eos, text.begins) for ids, text in zip(tokens.ids, texts, strict=True)]
        needed = torch.stack(last).amax(0) + 1
    order = needed.argsort(stable=True)  # prompts of like length are cut together
    parts = []
    for rows in order.split(ENCODE_BATCH):
        end = int(needed[rows].max())
        condition = pipeline.encode(Tokens(tuple(ids[rows, :end] for ids in tokens.ids)))
        found = pipeline.first_inputs(condition)
        parts.append({way: found[way].float() for way in ways if way in found})
    inputs = {}
    for way in parts[0]:
        longest = max(part[way].shape[1] for part in parts)
        padded = [pad(part[way], (0, 0, 0, longest - part[way].shape[1]), value=torch.nan) for part in parts]
        inputs[way] = torch.cat(padded)[order.argsort()]
    return inputs


def flattened(pipeline: Pipeline, tokens: Tokens, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``inputs`` (n, L, d_in) of each way at n prompts, at all positions that the denoiser reads, (m, d_in)."""
    mask = pipeline.read_positions(tokens)
    return {
        way: found.flatten(0, 1) if mask is None or way == "pooled" else found[mask.to(found.device)]
        for way, found in inputs.items()
    }


def subject_places(
    pipeline: Pipeline, phrases: TextKeys, guides: Sequence[TextKeys], which: SubjectTokens
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows (m,) and positions (m,) of the edited states of ``phrases``, and positions (m,) in each of the guides.

    They are those of ``subject_positions`` for each text encoder in turn, as far as the denoiser reads them; the only
    one of a pooled vector. A guide that is read to an earlier position gives the state at its last one.
    """
    if not phrases.ids:
        rows = torch.arange(len(phrases))
        zeros = torch.zeros_like(rows)
        return rows, zeros, [zeros for _ in guides]
    parts, start = [], 0
    for number, (text, ids) in enumerate(zip(pipeline.token_order, phrases.ids, strict=True)):
        encoder, of_guides = pipeline.texts[text], [guide.ids[number] for guide in guides]
        rows, places, guide_places = subject_positions(ids, of_guides, encoder.eos, which, encoder.begins)
        parts.append((rows, places + start, *(found + start for found in guide_places)))
        start += ids.shape[1]
    rows, places, *guide_places = (torch.cat(found) for found in zip(*parts, strict=True))
    if phrases.mask is not None:
        read = phrases.mask[rows, places]
        rows, places, guide_places = rows[read], places[read], [found[read] for found in guide_places]
        last = [guide.mask.sum(1) - 1 for guide in guides if guide.mask is not None]  # read from the first one on
        guide_places = [found.minimum(end[rows]) for found, end in zip(guide_places, last, strict=True)]
    return rows, places, guide_places


def retained_inputs(
    pipeline: Pipeline,
    ways: Sequence[str],
    prompts: Sequence[str],
    empty_weight: int = 0,
    last_subject: bool = False,
) -> dict[str, Retained]:
    """What is retained on each way: the sum of k kᵀ over the inputs at ``prompts``, computed in batches.

    If there are fewer keys than inputs of a map, the keys themselves are kept as well.

    Args:
        pipeline: The pipeline.
        ways: Names of ways.
        prompts: Prompts whose outputs should not change.
        empty_weight: How often the empty prompt counts besides them. Retained is nothing if this is zero and there are
            no prompts.
        last_subject: Whether only the state of each prompt's last token is retained.
    """
    texts = [*prompts, *([""] if empty_weight else [])]
    if not texts:
        return {way: Retained() for way in ways}
    moments: dict[str, list[Tensor]] = {way: [] for way in ways}
    kept: dict[str, list[Tensor]] = {way: [] for way in ways}
    counts, longest = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    apart = empty_weight > 1 or (empty_weight == 1 and pipeline.clip_skip is not None)  # as guidance reads it
    once = [*prompts, *([""] if empty_weight and not apart else [])]
    which: SubjectTokens = "last_subject" if last_subject else "all"
    size = SORTED_BATCH if _reads_to_subject(pipeline, ways, which) else ENCODE_BATCH
    batches = [(pipeline, once[start : start + size], 1) for start in range(0, len(once), size)]
    for reader, batch, weight in [*batches, *([(pipeline.unskipped, [""], empty_weight)] if apart else [])]:
        (found,) = text_keys(reader, batch, ways=ways, which=which)
        for way in ways:
            if last_subject:
                keys = found[way].at(*subject_places(pipeline, found[way], [], "last_subject")[:2])
            else:
                keys = found[way].read()
            moments[way].append(weight * second_moment(keys))
            counts[way], longest[way] = counts[way] + weight * len(keys), max(longest[way], largest_norm(keys))
            if counts[way] < keys.shape[1]:
                kept[way].append(keys if weight == 1 else keys.repeat(weight, 1))
    return {
        way: Retained(
            torch.stack(moments[way]).sum(0).cpu(),
            counts[way],
            for_solving(torch.cat(kept[way])) if sum(map(len, kept[way])) == counts[way] else None,
            prompts=len(texts),
            largest_norm=longest[way],
        )
        for way in ways
    }
