"""The retained keys of edited layers, of all in one pass or of one group of layers after the other.

    groups = RetainedLayers(method)      # of text encoders, or RetainedBlocks of the denoiser's blocks
    groups.of(name)                      # the retained keys of the layer and of all that are held together with it

Each layer's keys are summed up as the layer runs, so that the inputs of all layers are never held at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_unlearn.core.solvers import Retained
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.shared import moments
from lit_unlearn.methods.shared.moments import MomentSums, holding
from lit_unlearn.methods.shared.processes import Processes

Take = Callable[[str, Tensor], None]
"""Gets the name of a layer and some of its inputs, (m, d_in)."""


class GroupedMethod(Protocol):
    """What is read of a method."""

    pipeline: Pipeline
    processes: Processes
    layers: dict[str, nn.Linear]
    edited_names: list[str]


class RetainedGroups(ABC):
    """Gathers the retained keys of a method's layers, of all in one pass or in groups (``moments.holding``).

    Args:
        method: The method, whose pipeline is loaded.
        counts: Number of retained keys of each layer, each key of the empty prompt counted once.
        prompts: Number of prompts that they come from.
        work: What a pass takes, for the line that says how many there are; starts with a comma.
    """

    def __init__(self, method: GroupedMethod, counts: Mapping[str, int], prompts: int, work: str = "") -> None:
        self.editor, self.prompts = method, prompts
        self.holding = holding({name: method.layers[name].in_features for name in method.edited_names}, counts)
        groups = len(self.holding.groups)
        if groups > 1:
            rank_zero_info(
                f"The moments and null spaces of the retained keys of {len(method.edited_names)} layers take "
                f"{sum(self.holding.sizes.values()) / 1e9:.1f} GB, more than the {moments.MOST_HELD_BYTES / 1e9:.1f} "
                f"that are held at once: layers are taken in {groups} groups, which takes {groups} passes over the "
                f"retained prompts in each round{work} instead of one for all rounds."
            )

    @torch.no_grad()
    def of(self, name: str) -> dict[str, Retained]:
        """The retained keys of the layer ``name`` and of those that are held together with it.

        The model must be in the state before the edit. Processes divide the work, so all must call it.
        """
        (group,) = (group for group in self.holding.groups if name in group)
        layers = {own: self.editor.layers[own] for own in group}
        sums = MomentSums(layers, self.holding.thin)
        self.read_share(layers, sums.add)
        return sums.retained(self.editor.processes, self.prompts)

    @abstractmethod
    def read_share(self, layers: Mapping[str, nn.Linear], take: Take) -> None:
        """Give ``take`` the inputs of ``layers`` at this process's share of what is retained, as each layer runs."""


__all__ = ["GroupedMethod", "RetainedGroups", "Take"]
