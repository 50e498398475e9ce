"""Sums up the moments ``K0 K0ᵀ`` of retained keys, and says of how many layers they are held at once.

A moment has d_in² numbers and its null space up to as many, however few keys there are. Where those of all layers do
not fit, layers with fewer keys than inputs keep the keys themselves (``core.thin``), and if that is not enough, layers
are taken in groups that fit, each with a pass of its own over the retained prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.methods.shared.processes import Processes

MOST_HELD_BYTES = 4 * 2**30
"""Moments and null spaces of several layers that are held at once take at most this much memory, in the RAM of each
process; those of a single layer may take more."""
ROWS_BYTES = 2**28
"""Keys are converted to float64 in parts of at most this size."""


class Holding(NamedTuple):
    """Which layers' moments and null spaces are held together.

    Attributes:
        groups: Names of layers, each with those that are held together with it, in their order.
        thin: Those that keep their keys instead of a moment.
        sizes: Bytes of each layer's moment and null space.
    """

    groups: tuple[tuple[str, ...], ...]
    thin: frozenset[str]
    sizes: dict[str, int]

    @property
    def most(self) -> int:
        """Bytes of the largest group."""
        return max(sum(self.sizes[name] for name in group) for group in self.groups)


def holding(widths: Mapping[str, int], counts: Mapping[str, int]) -> Holding:
    """Choose what is held at once: if it fits, the moments of all layers.

    Args:
        widths: Number of inputs of each layer, in the order in which they are edited.
        counts: Number of retained keys of each.
    """
    sizes = {name: 2 * 8 * width**2 for name, width in widths.items()}
    thin: frozenset[str] = frozenset()
    if sum(sizes.values()) > MOST_HELD_BYTES:
        thin = frozenset(name for name, width in widths.items() if counts[name] < width)
        sizes |= {name: 2 * 8 * counts[name] * widths[name] for name in thin}
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > MOST_HELD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return Holding(tuple(map(tuple, groups)), thin, sizes)


class MomentSums:
    """Sums over the retained keys of some layers, batch by batch, on the CPU.

    Args:
        layers: The layers by the full names of their weights.
        thin: Names of those that keep their keys.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], thin: Collection[str] = ()) -> None:
        # On the CPU, since the moments of all layers are larger than the text encoder itself.
        self.sums = {
            name: torch.zeros(*2 * [layer.in_features], dtype=torch.float64)
            for name, layer in layers.items()
            if name not in thin
        }
        self.rows: dict[str, list[Tensor]] = {
            name: [torch.zeros(0, layer.in_features, dtype=torch.float64)]
            for name, layer in layers.items()
            if name in thin
        }
        self.names = list(layers)
        self.counts, self.norms = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0.0)

    def add(self, name: str, keys: Tensor) -> None:
        """Add ``keys`` (m, d_in) of the layer ``name``."""
        for part in keys.split(max(1, ROWS_BYTES // (8 * keys.shape[1]))):
            if name in self.rows:
                self.rows[name].append(part.double().cpu())
            else:
                self.sums[name] += second_moment(part).cpu()
            self.counts[name] += len(part)
            self.norms[name] = max(self.norms[name], largest_norm(part))

    def retained(self, processes: Processes, prompts: int) -> dict[str, Retained]:
        """The sums over all processes, of keys that come from so many prompts; they are not kept here."""
        of_all = processes.gathered((self.counts, self.norms))
        retained = {}
        for name in self.names:
            count, longest = sum(own[name] for own, _ in of_all), max(own[name] for _, own in of_all)
            if name in self.rows:
                own_rows = torch.cat(self.rows.pop(name))
                moment: Tensor | ThinMoment = ThinMoment(torch.cat(processes.gathered(own_rows)))
            else:
                moment = processes.total(self.sums.pop(name))
            retained[name] = Retained(moment, count, prompts=prompts, largest_norm=longest)
        return retained


__all__ = ["MOST_HELD_BYTES", "ROWS_BYTES", "Holding", "MomentSums", "holding"]
