"""The retained keys of layers in the denoiser's blocks, from the model as it was before any edit.

blocks = RetainedBlocks(method, noisy, timesteps, conditions, prompts)
blocks.of(name)         # a pass of the denoiser over all of them, see ``RetainedGroups``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.hooks import each_input
from lit_unlearn.methods.shared.retained_groups import GroupedMethod, RetainedGroups, Take
from lit_unlearn.methods.shared.unet_layers import later_batches, places_in_block


class RetainedBlocks(RetainedGroups):
    """Gathers the retained keys of layers whose inputs depend on x_t and t.

    They are held on the device, x_t and the states of each condition once: until the one pass is done, or, if there are
    several, until the end of the fit.

    Args:
        method: The method, whose pipeline is loaded.
        noisy: x_t of the items, (n, C, H, W), at which the layers' outputs should not change.
        timesteps: t of the items, (n,).
        conditions: What the denoiser reads with them: the items are asked once with each, with its rows in turn.
        prompts: Number of prompts that they come from.
    """

    def __init__(
        self, method: GroupedMethod, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Condition], prompts: int
    ) -> None:
        self.queries = [make for each in conditions for make in later_batches(noisy, timesteps, each)]
        items, length = len(noisy) * len(conditions), conditions[0].states.shape[1]
        counts = {name: items * places_in_block(method.pipeline, name, length) for name in method.edited_names}
        super().__init__(method, counts, prompts, f", each of {items:,} forwards of the denoiser,")

    def read_share(self, layers: Mapping[str, nn.Linear], take: Take) -> None:
        """See ``RetainedGroups.read_share``; the queries are released if no further pass needs them."""
        for make in self.editor.processes.own_share(self.queries):
            with each_input(layers, lambda name, keys: take(name, keys.flatten(0, 1))):
                self.editor.pipeline.predict(*make())
        if len(self.holding.groups) == 1:
            self.queries = []


__all__ = ["RetainedBlocks"]
