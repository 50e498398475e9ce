"""Layers of text encoders that an edit writes: which ones, where each is read, and which positions of prompts pair up.

An encoder is read after one layer by the way of the states and perhaps after another by that of the pooled vector
(``BaseModel.read_after``). A stretch is the edited layers before such a place, and after the place before:

    text_encoder_2 of SDXL, of N layers     0 .. N-2 -> states      N-1 -> pooled vector
    a T5, or the encoder of SD 1.x          0 .. N-1 -> states

The pooled vector is a prompt's state at the end of its text. So of a feed-forward network in the last layer, which
nothing else reads, only that position acts, and only it is edited and retained. It counts as often as a text has
positions, so that a ridge means the same in all layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_unlearn.core.alignment import Positions, align_tokens, from_first_difference, positions_mask
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.hooks import capture_inputs, each_input
from lit_unlearn.diffusion.parameters import layer_index
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text import TextEncoder, Tokens
from lit_unlearn.methods.shared.layer_state import LayerInputs

if TYPE_CHECKING:
    from lit_unlearn.methods.value_refinement import ValueRefinement

TEXT_LAYER = re.compile(r"text_encoder(_\d)?\..*(layers\.\d+|encoder\.block\.\d+)\..*weight$")
"""Full names of the weights of numbered layers, of a CLIP and of a T5."""
ADDS_TO_STREAM = re.compile(r"(mlp\.fc2|self_attn\.out_proj|DenseReluDense\.wo|SelfAttention\.o)\.weight$")
"""Names of the weights whose outputs are added to the residual stream."""


@dataclass(frozen=True)
class Stretch:
    """Edited layers of a text encoder that lead to the same place where it is read.

    Attributes:
        part: The text encoder.
        names: Full names of the weights, first to last.
        read_after: The layer after which it is read, counted from the last (-1).
        only_end: Names of those that act on nothing except at the end of a text.
    """

    part: str
    names: tuple[str, ...]
    read_after: int
    only_end: tuple[str, ...] = ()


def part_of(name: str) -> str:
    """The part of the pipeline that the weight with the full name ``name`` belongs to."""
    return name.split(".", 1)[0]


def by_part(names: Sequence[str]) -> dict[str, list[str]]:
    """The weights ``names`` by the text encoder that they belong to, each in the order of its layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return {part: sorted(own, key=layer_index) for part, own in found.items()}


def unmoved_layers(edited: Sequence[str]) -> set[str]:
    """Weights among ``edited`` whose inputs none of the edits moves: the first of an encoder, if alone in its layer."""
    parts = by_part(edited).values()
    return {own[0] for own in parts if len(own) == 1 or layer_index(own[0]) < layer_index(own[1])}


def inputs_of(
    text: TextEncoder,
    name: str,
    layer: nn.Module,
    input_ids: Tensor,
    stream_after: int | None = None,
    with_before: bool = False,
) -> LayerInputs:
    """What prompts show of the ``layer`` of ``text`` that has the weight ``name``, from one pass of each.

    Args:
        text: The text encoder.
        name: Full name of the weight.
        layer: The layer.
        input_ids: Tokens, (n, L).
        stream_after: Number of the layer after which the stream is read, see ``TextEncoder.stream``; None: it is not.
        with_before: Whether ``before`` is read.
    """
    found: Tensor | None = None
    before, streams = [], []
    block = text.block_of(name) if with_before else None
    watched = {name: layer} if block is None else {name: layer, "block": block[0].get_submodule(f"layers.{block[1]}")}
    for start in range(0, len(input_ids), ENCODE_BATCH):
        part = input_ids[start : start + ENCODE_BATCH]
        with capture_inputs(watched) as captured:
            if stream_after is None:
                text.states(part)
            else:
                streams.append(text.stream(part, stream_after))
        before += [captured["block"]] if block else []
        keys = captured[name]
        if found is None:  # filled part by part, since to join the parts takes twice the memory
            found = keys.new_empty(len(input_ids), *keys.shape[1:], dtype=torch.float32)
        found[start : start + len(part)] = keys
    assert found is not None
    return LayerInputs(found, *(torch.cat(parts) if parts else None for parts in (before, streams)))


def read_inputs(
    pipeline: Pipeline,
    layers: Mapping[str, nn.Module],
    edited: Sequence[Stretch],
    tokens: Tokens,
    take: Callable[[str, Tensor], None],
) -> Condition:
    """Pass prompts through the text encoders, giving the inputs (m, d_in) of each of ``layers`` to ``take``.

    These are the inputs at all positions that are read, B L of them or fewer. They are given as the layer runs, so that
    those of one layer are gone before those of the next are made.

    Args:
        pipeline: The pipeline.
        layers: Layers of text encoders by the full names of their weights.
        edited: The stretches that they belong to; of layers that act only at the end of a text, each position gets the
            input there.
        tokens: The prompts, B.
        take: Called with the name of a layer and its inputs.

    Returns:
        The condition for the prompts, from the same forward passes.
    """
    only_end = {name for stretch in edited for name in stretch.only_end}
    read = {text.part: (text, ids) for text, ids in zip(pipeline.texts, tokens.ids, strict=True)}

    def select(name: str, keys: Tensor) -> None:
        text, ids = read[part_of(name)]
        if name in only_end:
            keys = keys[ends(ids, text).to(keys.device)].unsqueeze(1).expand_as(keys)
        elif text.masked:
            keys = keys[text.reads(ids).to(keys.device)].unsqueeze(0)
        take(name, keys.flatten(0, 1))

    with each_input(layers, select):
        return pipeline.condition(tokens)


def select_text_layers(method: ValueRefinement, names: Sequence[str]) -> list[str]:
    """Weights among ``names`` that the pattern of ``method`` selects in the layers that it edits of text encoders.

    Raises:
        ValueError: No layer of a text encoder is left, a weight outside the text layers is selected, or one for which
            the method's ``positions`` or ``start`` is not possible.
    """
    why = ": only weights of text layers, such as text-fc2 or a pattern that ends with weight."
    selected = method.select_only(names, lambda name: bool(TEXT_LAYER.match(name)), why)
    read_after, pattern = method.base.read_after, method.edited_parameters
    kept = chosen_layers(selected, method.first_layer, method.last_layer, names, read_after, pattern)
    for name in kept:
        if method.start == "residual" and not ADDS_TO_STREAM.search(name):
            raise ValueError(
                f"edited_parameters={pattern!r} selects {name}, whose output is not added to the residual stream, as "
                "'residual' needs: choose text-fc2, or values and start without it."
            )
    if method.positions == "content":
        for stretch in stretches(kept, names, read_after):
            if stretch.only_end:
                raise ValueError(
                    f"model.positions='content' edits nothing in {stretch.only_end[0]}, which acts only at the end of "
                    "a text: choose all or eot, or leave the layer out with edited_parameters or last_layer."
                )
    return kept


def chosen_layers(
    selected: Sequence[str],
    first_layer: int,
    last_layer: int | None,
    names: Sequence[str],
    read_after: Mapping[str, Mapping[str, int]],
    pattern: str,
) -> list[str]:
    """Those of the weights ``selected`` that are in the layers from ``first_layer`` to ``last_layer`` of their encoder.

    A negative number counts from the last selected layer of which the denoiser reads the states, or from the last
    selected one if it reads only the pooled vector. Layers behind it, which act on the pooled vector alone, are chosen
    too if ``last_layer`` is None.

    Args:
        selected: Full names of weights of layers of text encoders.
        first_layer: Number of a layer of each encoder, from 0 or, counted from the end, -1.
        last_layer: In the same way; None for the last selected one.
        names: Full names of all weights.
        read_after: See ``BaseModel.read_after``.
        pattern: What has selected the weights, for the message.

    Raises:
        ValueError: No layer of an encoder is left.
    """
    kept: list[str] = []
    counts, parts = _layer_counts(names), by_part(selected)
    for part, own in parts.items():
        last_selected, place = layer_index(own[-1]), read_after[part].get("tokens", -1)
        end = min(last_selected, counts[part] + place) + 1
        low, high = (
            end + number if number < 0 else number
            for number in (first_layer, last_selected if last_layer is None else last_layer)
        )
        left = [name for name in own if low <= layer_index(name) <= high]
        if not left:
            whose = f" of {part}" if len(parts) > 1 else ""
            raise ValueError(
                f"model.first_layer={first_layer} and last_layer={last_layer} leave no layer{whose} to edit: "
                f"the pattern {pattern!r} selects the layers {layer_index(own[0])} to {last_selected}."
            )
        kept += left
    return kept


def stretches(
    edited: Sequence[str], names: Sequence[str], read_after: Mapping[str, Mapping[str, int]]
) -> tuple[Stretch, ...]:
    """The edited weights in stretches, first to last.

    Args:
        edited: Full names of the edited weights.
        names: Full names of all weights.
        read_after: See ``BaseModel.read_after``.
    """
    return tuple(_stretches(edited, names, read_after))


def _stretches(
    edited: Sequence[str], names: Sequence[str], read_after: Mapping[str, Mapping[str, int]]
) -> Iterator[Stretch]:
    counts = _layer_counts(names)
    for part, own in by_part(edited).items():
        before = 0
        for place in sorted(set(read_after[part].values())):
            end = counts[part] + place + 1
            there = tuple(name for name in own if before <= layer_index(name) < end)
            pooled_only = read_after[part].get("tokens") != place
            at_end = [name for name in there if pooled_only and layer_index(name) == end - 1 and ".mlp." in name]
            if there:
                yield Stretch(part, there, place, tuple(at_end))
            before = end


def _layer_counts(names: Sequence[str]) -> dict[str, int]:
    """Number of layers of each text encoder."""
    numbered = [name for name in names if TEXT_LAYER.match(name)]
    return {part: layer_index(own[-1]) + 1 for part, own in by_part(numbered).items()}


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """The tokens of prompt pairs for one text encoder, and which positions of theirs belong together.

    Attributes:
        text: The text encoder.
        edit_ids: ``input_ids`` of the edit prompts, (n, L).
        target_ids: ``input_ids`` of the target prompts, (n, L).
        mask: Positions that are edited, (n, L) bool.
        alignment: For each position of an edit prompt, the position of its target prompt that is aligned with it,
            (n, L).
    """

    text: TextEncoder
    edit_ids: Tensor
    target_ids: Tensor
    mask: Tensor
    alignment: Tensor

    @classmethod
    def of(
        cls, text: TextEncoder, edit_ids: Tensor, target_ids: Tensor, positions: Positions, device: torch.device
    ) -> TokenPairs:
        """Align the prompts; the mask of the edited ``positions``, as far as they are read, is on ``device``."""
        pairs = zip(edit_ids.tolist(), target_ids.tolist(), strict=True)
        alignment = torch.tensor([align_tokens(e, t, text.eos, text.begins) for e, t in pairs])
        mask = positions_mask(edit_ids, text.eos, positions, text.begins) & text.reads(edit_ids)
        return cls(text, edit_ids, target_ids, mask.to(device), alignment)

    def align(self, rows: Tensor) -> Tensor:
        """Move ``rows`` of the target prompts, (n, L, D), to the edit positions that are aligned with them."""
        return taken(rows, self.alignment)

    def carrying(self) -> Tensor:
        """Positions (n, L), bool, whose states can have seen the concept: all, if the encoder reads both directions."""
        if not self.text.causal:
            return torch.ones_like(self.edit_ids, dtype=torch.bool)
        return from_first_difference(self.edit_ids, self.target_ids)


def ends(input_ids: Tensor, text: TextEncoder) -> Tensor:
    """The position at which each text ends, where a CLIP's pooled vector is read, as a mask (n, L), bool."""
    ended = positions_mask(input_ids, text.eos, "eot", text.begins)
    return ended & (ended.cumsum(-1) == 1)


def taken(rows: Tensor, positions: Tensor) -> Tensor:
    """``rows`` (n, L, D) at ``positions`` (n, L) of each text."""
    return rows.gather(1, positions.to(rows.device).unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
