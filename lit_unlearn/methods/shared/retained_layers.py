"""The retained keys of the layers of text encoders, from the model as it was before any edit.

    layers = RetainedLayers(method)
    layers.of(name)              # the retained keys of the layer and of all that are held together with it
    layers.outputs               # what the denoiser reads of the retained prompts, from the first pass

Each layer's keys are summed up as the layer runs, so that the inputs of all layers are never held at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.shared import moments
from lit_unlearn.methods.shared.layer_state import outputs_of
from lit_unlearn.methods.shared.moments import MomentSums, holding
from lit_unlearn.methods.shared.processes import Processes
from lit_unlearn.methods.shared.text_layers import Stretch, part_of, read_inputs


class _Method(Protocol):
    """What is read of the method."""

    pipeline: Pipeline
    processes: Processes
    layers: dict[str, nn.Linear]
    edited_names: list[str]
    retain_prompts: list[str]
    retain_empty: bool | None

    @property
    def stretches(self) -> Sequence[Stretch]:
        """The edited layers by the places where they are read."""


class RetainedLayers:
    """Gathers the retained keys of a method's text layers, of all in one pass or in groups (``moments.holding``).

    Args:
        method: The method, whose pipeline is loaded.
    """

    def __init__(self, method: _Method) -> None:
        self.method = method
        pipeline = method.pipeline
        self.tokens = pipeline.tokenize(method.retain_prompts)
        empty = retains_empty(pipeline) if method.retain_empty is None else method.retain_empty
        self.empty = pipeline.tokenize([""]) if empty else None
        self.outputs: list[Tensor] = []
        self.holding = holding({name: method.layers[name].in_features for name in method.edited_names}, self._counts())
        groups = len(self.holding.groups)
        if groups > 1:
            rank_zero_info(
                f"The moments and null spaces of the retained keys of {len(method.edited_names)} layers take "
                f"{sum(self.holding.sizes.values()) / 1e9:.1f} GB, more than the {moments.MOST_HELD_BYTES / 1e9:.1f} "
                f"that are held at once: layers are taken in {groups} groups, which takes {groups} passes over the "
                "retained prompts in each round instead of one for all rounds."
            )

    def _counts(self) -> dict[str, int]:
        """Number of retained keys of each layer, each key of the empty prompt counted once."""
        of_part = {}
        for number, text in enumerate(self.method.pipeline.texts):
            ids = [tokens.ids[number] for tokens in (self.tokens, self.empty) if tokens is not None]
            of_part[text.part] = sum(int(text.reads(own).sum()) for own in ids)
        return {name: of_part[part_of(name)] for name in self.method.edited_names}

    @torch.no_grad()
    def of(self, name: str) -> dict[str, Retained]:
        """The retained keys of the layer ``name`` and of those that are held together with it.

        The model must be in the state before the edit. Processes divide the prompts, so all must call it.
        """
        (group,) = (group for group in self.holding.groups if name in group)
        layers = {own: self.method.layers[own] for own in group}
        sums, first = MomentSums(layers, self.holding.thin), not self.outputs
        for part in self.method.processes.own_share(list(self.tokens.split(ENCODE_BATCH))):
            condition = read_inputs(self.method.pipeline, layers, self.method.stretches, part, sums.add)
            if first:
                self.outputs += outputs_of(condition)
        retained = sums.retained(self.method.processes, len(self.tokens))
        if self.empty is not None:
            self._add_empty(retained, layers, self.empty)
        return retained

    def _add_empty(self, retained: dict[str, Retained], layers: Mapping[str, nn.Linear], empty: Tokens) -> None:
        """Add the empty prompt, which counts as often as all retained prompts together."""
        times = len(self.tokens)

        def add(name: str, keys: Tensor) -> None:
            own = retained[name]
            assert own.moment is not None and own.largest_norm is not None
            if isinstance(own.moment, ThinMoment):
                moment: Tensor | ThinMoment = ThinMoment(torch.cat([own.moment.rows, times**0.5 * keys.double().cpu()]))
            else:
                moment = own.moment + times * second_moment(keys).cpu()
            longest = max(own.largest_norm, largest_norm(keys))
            retained[name] = replace(own, moment=moment, count=own.count + times * len(keys), largest_norm=longest)

        read_inputs(self.method.pipeline, layers, self.method.stretches, empty, add)


def retains_empty(pipeline: Pipeline) -> bool:
    """Whether the empty prompt is retained by default: with several text encoders, or one that reads both ways."""
    return len(pipeline.texts) > 1 or not pipeline.texts[0].causal
