"""The retained keys of the layers of text encoders, from the model as it was before any edit.

    layers = RetainedLayers(method)
    layers.of(name)              # see ``RetainedGroups``
    layers.outputs               # what the denoiser reads of the retained prompts, from the first pass

Processes divide the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.shared.layer_state import outputs_of
from lit_unlearn.methods.shared.retained_groups import GroupedMethod, RetainedGroups, Take
from lit_unlearn.methods.shared.text_layers import Stretch, part_of, read_inputs


class _Method(GroupedMethod, Protocol):
    """What is read of the method."""

    retain_prompts: list[str]
    retain_empty: bool | None

    @property
    def stretches(self) -> Sequence[Stretch]:
        """The edited layers by the places where they are read."""


class RetainedLayers(RetainedGroups):
    """Gathers the retained keys of a method's text layers, see ``RetainedGroups``.

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
        super().__init__(method, self._counts(), len(self.tokens))

    def _counts(self) -> dict[str, int]:
        """Number of retained keys of each layer, each key of the empty prompt counted once."""
        of_part = {}
        for number, text in enumerate(self.method.pipeline.texts):
            ids = [tokens.ids[number] for tokens in (self.tokens, self.empty) if tokens is not None]
            of_part[text.part] = sum(int(text.reads(own).sum()) for own in ids)
        return {name: of_part[part_of(name)] for name in self.method.edited_names}

    @torch.no_grad()
    def of(self, name: str) -> dict[str, Retained]:
        """See ``RetainedGroups.of``."""
        retained = super().of(name)
        if self.empty is not None:
            self._add_empty(retained, {own: self.method.layers[own] for own in retained}, self.empty)
        return retained

    def read_share(self, layers: Mapping[str, nn.Linear], take: Take) -> None:
        """See ``RetainedGroups.read_share``; the first pass also gives ``outputs``."""
        first = not self.outputs
        for part in self.method.processes.own_share(list(self.tokens.split(ENCODE_BATCH))):
            condition = read_inputs(self.method.pipeline, layers, self.method.stretches, part, take)
            if first:
                self.outputs += outputs_of(condition)

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
