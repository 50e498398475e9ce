"""One layer while its values are refined, and means over the positions that are edited."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class LayerState:
    """The data for the edit of one layer; rows are samples.

    Attributes:
        name: Full name of the weight.
        layer: The linear layer, W (d_out, d_in).
        keys: K1, inputs at the edit prompts, (n, L, d_in).
        initial: W K1, (n, L, d_out), where V1 starts.
        mask: Positions that are edited, (n, L) bool.
        weight: How often each edited position counts.
    """

    name: str
    layer: nn.Linear
    keys: Tensor
    initial: Tensor
    mask: Tensor
    weight: int = 1

    def edited(self, rows: Tensor) -> Tensor:
        """``rows`` (n, L, ...) at the edited positions, (m, ...), without a copy if all positions are edited once."""
        found = rows.flatten(0, 1) if self.mask.all() else rows[self.mask]
        return found if self.weight == 1 else found.repeat_interleave(self.weight, 0)


def per_item(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over items of the means over their masked positions; ``rows`` and ``mask`` are (B, L).

    Each item has the same weight, however many positions it has, so that processes can share a batch.
    """
    return ((rows * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
