"""The retained keys of layers in the denoiser's blocks, from the model as it was before any edit.

blocks = RetainedBlocks(method, queries, prompts)
blocks.of(name)         # a pass of the denoiser over all queries, see ``RetainedGroups``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lit_unlearn.diffusion.hooks import each_input
from lit_unlearn.methods.shared.retained_groups import GroupedMethod, RetainedGroups, Take
from lit_unlearn.methods.shared.unet_layers import Query, places_in_block


class RetainedBlocks(RetainedGroups):
    """Gathers the retained keys of layers whose inputs depend on x_t and t.

    Args:
        method: The method, whose pipeline is loaded.
        queries: Inputs of the denoiser at which the layers' outputs should not change, in batches.
        prompts: Number of prompts that they come from.
    """

    def __init__(self, method: GroupedMethod, queries: Sequence[Query], prompts: int) -> None:
        self.queries = list(queries)
        items = sum(len(timesteps) for _, timesteps, _ in self.queries)
        length = self.queries[0][2].states.shape[1]
        counts = {name: items * places_in_block(method.pipeline, name, length) for name in method.edited_names}
        super().__init__(method, counts, prompts, f", each of {items:,} forwards of the denoiser,")

    def read_share(self, layers: Mapping[str, nn.Linear], take: Take) -> None:
        """See ``RetainedGroups.read_share``; the queries are released if no further pass needs them."""
        for query in self.editor.processes.own_share(self.queries):
            with each_input(layers, lambda name, keys: take(name, keys.flatten(0, 1))):
                self.editor.pipeline.predict(*query)
        if len(self.holding.groups) == 1:
            self.queries = []


__all__ = ["RetainedBlocks"]
