"""Shared code of the two null-space edits in the denoiser: what is edited, asked, and watched for change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.parameters import call_order
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.shared.noised import UNET_BATCH, drawn, noised
from lit_unlearn.methods.shared.text_layers import TokenPairs, taken
from lit_unlearn.system.names import check_numbers

if TYPE_CHECKING:
    from lit_unlearn.methods.value_refinement import ValueRefinement

WATCHED_SEED = 10_000_000
"""Added to the seeds of watched pictures, so that they differ from the edit prompts' seeds."""

OF_PICTURE, OF_TEXT = "ff.net.2.weight", ("attn.add_k_proj.weight", "attn.add_v_proj.weight")
"""Ends of the names of layers in blocks, whose inputs are at the picture's positions and at the text's."""

Query = tuple[Tensor, Tensor, Condition]
"""Inputs of the denoiser: x_t (B, C, H, W), t (B,) and the condition of B prompts."""


def check_choices(kind: str, values: str, start: str, watched_prompts: int) -> None:
    """Check that the options are possible for an edit in the denoiser.

    Raises:
        ValueError: ``values`` or ``start`` needs the residual stream of a text encoder, or ``watched_prompts`` is < 1.
    """
    for field, value, known in (("values", values, "refined"), ("start", start, "output")):
        if value not in (known, "target"):
            raise ValueError(f"model.{field}={value!r} is not possible for {kind}: choose {known} or target.")
    check_numbers("model", watched_prompts=watched_prompts)


def select_in_blocks(method: ValueRefinement, names: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Weights of the denoiser that the pattern of ``method`` selects, in the order in which the denoiser calls them.

    Raises:
        ValueError: A selected weight does not end with any of ``suffixes``.
    """
    part = method.base.family.denoiser_part
    why = f": {type(method).__name__} edits only {' and '.join(suffixes)} of the {part}."
    selected = method.select_only(names, lambda name: name.startswith(f"{part}.") and name.endswith(suffixes), why)
    return sorted(selected, key=call_order)


def places_in_block(pipeline: Pipeline, name: str, length: int) -> int:
    """Number of positions of the inputs of the layer ``name`` in a block: of the picture, or those of the text.

    Args:
        pipeline: The pipeline.
        name: Full name of the layer's weight.
        length: Number of positions of the text states that the denoiser is given.
    """
    return length if name.endswith(OF_TEXT) else pipeline.num_places(name)


@dataclass(frozen=True)
class StatePairs:
    """Positions of prompt pairs among the states of all text encoders, whose positions may follow one another.

    Attributes:
        mask: Edited positions, (n, L) bool.
        alignment: For each position of an edit prompt, that of its target prompt which is aligned with it, (n, L).
        carrying: Positions whose states can have seen the concept, (n, L) bool.
    """

    mask: Tensor
    alignment: Tensor
    carrying: Tensor

    @classmethod
    def of(cls, parts: Sequence[TokenPairs], length: int) -> StatePairs:
        """Of the text encoders in ``parts``; any positions up to ``length`` that are behind theirs are not edited."""
        masks, alignments, carrying, start = [], [], [], 0
        for pairs in parts:
            masks.append(pairs.mask)
            alignments.append(start + pairs.alignment)
            carrying.append(pairs.carrying())
            start += pairs.mask.shape[1]
        mask, alignment, found = (torch.cat(rows, dim=1) for rows in (masks, alignments, carrying))
        if rest := length - start:
            mask = torch.cat([mask, mask.new_zeros(len(mask), rest)], dim=1)
            alignment = torch.cat([alignment, torch.arange(start, length).expand(len(mask), -1)], dim=1)
            found = torch.cat([found, found.new_zeros(len(mask), rest)], dim=1)
        return cls(mask, alignment, found)

    def align(self, rows: Tensor) -> Tensor:
        """Move ``rows`` of the target prompts, (n, L, D), to the edit positions that are aligned with them."""
        return taken(rows, self.alignment)


def query_batches(noisy: Tensor, timesteps: Tensor, condition: Condition) -> list[Query]:
    """Batches of inputs for the denoiser: x_t and t of the items, with the rows of ``condition`` in turn."""
    return [make() for make in later_batches(noisy, timesteps, condition)]


def later_batches(noisy: Tensor, timesteps: Tensor, condition: Condition) -> list[Callable[[], Query]]:
    """As ``query_batches``, each made when it is called: until then no prompt is held more than once."""

    def make(items: Tensor) -> Query:
        return noisy[items], timesteps[items], condition[items % len(condition)]

    return [partial(make, items) for items in torch.arange(len(noisy)).split(UNET_BATCH)]


@dataclass(frozen=True)
class Watched:
    """Noised pictures of some retained prompts, for which the denoiser's predictions should not change.

    Attributes:
        method: The method that edits.
        asked: Inputs of the denoiser, in batches.
    """

    method: ValueRefinement
    asked: Sequence[Query]

    @classmethod
    def of(cls, method: ValueRefinement, number: int) -> Watched:
        """Draw pictures of ``number`` retained prompts of ``method``, spread over the set; not counted as cost."""
        every = max(1, len(method.retain_prompts) // number)
        condition = method.pipeline.encode_many(method.retain_prompts[::every][:number])
        with method.uncounted():
            pictures = drawn(method, condition, WATCHED_SEED)
        return cls(method, query_batches(*noised(method, pictures, "watched"), condition))

    @torch.no_grad()
    def predictions(self) -> list[Tensor]:
        """This process's share of the predictions, (B, C, H, W) each, float32."""
        with self.method.uncounted():
            return [
                self.method.pipeline.predict(*query).float() for query in self.method.processes.own_share(self.asked)
            ]
