"""One layer while its values are refined: its keys, kept between rounds, and means over the edited positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.system.devices import for_solving

MOST_KEPT_BYTES = 2**30
"""Keys that are kept between rounds take at most this much memory; the rest is computed anew."""


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
        before: The states at the edit prompts with which a step of a descent begins, (n, L, D), if they are known; see
            ``TextEncoder.block_of``.
        stream: The residual stream of the edit prompts where V1 is compared to its goal, (n, L, D), float32, if the
            method reads it.
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
    """Inputs of layers that are the same in every round, each computed once.

    Attributes:
        found: Keys (n, L, d_in) by the name of their layer, with the ``input_ids`` (n, L) that they belong to.
        rows: The same as rows (n L, d_in), where all are edited, by the name of the layer.
        before: See ``LayerState.before``, by the name of the layer.
    """

    found: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, input_ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys (n, L, d_in) of the layer ``name`` for the very tensor ``input_ids`` (n, L), by ``compute`` if new."""
        own = self.found.setdefault(name, [])
        for ids, keys in own:
            if ids is input_ids:
                return keys
        keys = compute(input_ids)
        held = sum(kept.nbytes for pairs in self.found.values() for _, kept in pairs)
        if held + keys.nbytes <= MOST_KEPT_BYTES:
            own.append((input_ids, keys))
        return keys

    def share_rows(self, state: LayerState) -> None:
        """Give ``state`` the rows of an earlier round, if its keys are kept and all of them are edited once."""
        kept = any(keys is state.keys for _, keys in self.found.get(state.name, []))
        if kept and state.weight == 1 and state.mask.all():
            state.rows = self.rows.setdefault(state.name, state.edited(state.keys))


def outputs_of(condition: Condition) -> list[Tensor]:
    """What the denoiser reads, float32: states (B, L, D), and pooled vectors (B, P) if there are any."""
    return [part.float() for part in (condition.states, condition.pooled) if part is not None]
