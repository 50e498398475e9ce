"""One layer while its values are refined: its keys, kept between rounds, and means over the edited positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.system.devices import for_solving

MOST_KEPT_BYTES = 2**30
"""Keys that are kept between rounds take at most this much memory; the rest is computed anew."""


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What prompts show of a layer of a text encoder.

    Attributes:
        keys: Inputs of the layer, (n, L, d_in), float32.
        before: What the first layer reads that runs again when this one's output changes (``TextEncoder.block_of``),
            (n, L, D), if it was asked for; never of a T5.
        stream: The residual stream, (n, L, D), float32, if it was asked for.
    """

    keys: Tensor
    before: Tensor | None = None
    stream: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.nbytes for part in (self.keys, self.before, self.stream) if part is not None)


@dataclass
class LayerState:
    """The data for the edit of one layer; rows are samples.

    Attributes:
        name: Full name of the weight.
        layer: The linear layer, W (d_out, d_in).
        keys: K1, inputs at the edit prompts, (n, L, d_in).
        mask: Positions that are edited, (n, L) bool.
        weight: How often each edited position counts.
        rows: Keys at the edited positions (m, d_in), if layers or rounds share them: one tensor, by which a solver
            knows that they are the same.
        anchors: Keys whose outputs by ``anchor_weight`` are V1, row by row with the edited keys, (m, d_in), if V1 is
            not found by a descent; one tensor for all layers that share it.
        anchor_weight: See ``Write.anchor_weight``.
        before: What the first layer that a step of a descent runs reads at the edit prompts, (n, L, D), if known.
        stream: The residual stream of the edit prompts where V1 is compared to its goal, (n, L, D), float32, if the
            method reads it; None again when V1 has its start.
    """

    name: str
    layer: nn.Linear
    keys: Tensor
    mask: Tensor
    weight: int = 1
    rows: Tensor | None = None
    anchors: Tensor | None = None
    anchor_weight: Tensor | None = None
    before: Tensor | None = None
    stream: Tensor | None = None

    @cached_property
    def initial(self) -> Tensor:
        """W K1, (n, L, d_out), float32, where V1 starts; it must be asked for before the layer is written."""
        with torch.no_grad(), torch.autocast(self.keys.device.type, enabled=False):
            return self.keys @ self.layer.weight.float().mT

    @property
    def edited_keys(self) -> Tensor:
        """K1 at the edited positions, (m, d_in)."""
        return self.edited(self.keys) if self.rows is None else self.rows

    def write(self, values: Tensor | None, retained: Retained, concept_keys: Tensor | None) -> Write:
        """What to write so that the layer gives ``values`` (n, L, d_out) at the edited positions.

        Args:
            values: V1; None: the outputs of ``anchors``.
            retained: Keys whose outputs should not change.
            concept_keys: Which edited keys can have seen the concept, (m,) bool; None: all.
        """
        weight, shared = self.layer.weight.detach(), self.rows is not None
        wished = None if values is None else self.edited(values)
        given = self.name, for_solving(weight).clone(), weight.dtype, self.edited_keys, wished, retained
        anchors = self.anchors, self.anchor_weight
        return Write(*given, *anchors, concept_keys=concept_keys, shared=shared)

    def edited(self, rows: Tensor) -> Tensor:
        """``rows`` (n, L, ...) at the edited positions, (m, ...), without a copy if all positions are edited once."""
        found = rows.flatten(0, 1) if self.mask.all() else rows[self.mask]
        return found if self.weight == 1 else found.repeat_interleave(self.weight, 0)


def per_item(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over items of the means over their masked positions; ``rows`` and ``mask`` are (B, L).

    Each item has the same weight, however many positions it has, so that processes can share a batch.
    """
    return ((rows * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


@dataclass
class KeptKeys:
    """Inputs of layers that are the same in every round, each computed once as far as ``MOST_KEPT_BYTES`` allow.

    Attributes:
        found: What is kept of each layer, by its name, with the ``input_ids`` (n, L) that it belongs to; no streams,
            which edits move.
        rows: The keys as rows (n L, d_in), where all are edited, by the name of the layer.
    """

    found: dict[str, list[tuple[Tensor, LayerInputs]]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, input_ids: Tensor, compute: Callable[[Tensor], LayerInputs]) -> LayerInputs:
        """What the very tensor ``input_ids`` (n, L) shows of the layer ``name``, by ``compute`` if new."""
        own = self.found.setdefault(name, [])
        for ids, known in own:
            if ids is input_ids:
                return known
        read = compute(input_ids)
        lasting = replace(read, stream=None)
        held = sum(kept.nbytes for pairs in self.found.values() for _, kept in pairs)
        if held + lasting.nbytes <= MOST_KEPT_BYTES:
            own.append((input_ids, lasting))
        return read

    def share_rows(self, state: LayerState) -> None:
        """Give ``state`` the rows of an earlier round, if its keys are kept and all of them are edited once."""
        kept = any(known.keys is state.keys for _, known in self.found.get(state.name, []))
        if kept and state.weight == 1 and state.mask.all():
            state.rows = self.rows.setdefault(state.name, state.edited(state.keys))


def outputs_of(condition: Condition) -> list[Tensor]:
    """What the denoiser reads, float32: states (B, L, D), and pooled vectors (B, P) if there are any."""
    return [part.float() for part in (condition.states, condition.pooled) if part is not None]
