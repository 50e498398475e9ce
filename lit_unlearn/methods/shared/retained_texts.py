"""What text encoders read and give of retained prompts: keys whose outputs should not change, and those outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.shared.text_layers import inputs_and_condition

if TYPE_CHECKING:
    from lit_unlearn.methods.shared.processes import Processes
    from lit_unlearn.methods.value_refinement import ValueRefinement


def retained_moments(method: ValueRefinement) -> tuple[dict[str, Retained], list[Tensor]]:
    """Encode the retained prompts of ``method``; sum up ``K0 K0ᵀ`` (d_in, d_in), float64, and count the keys.

    Returns:
        For each edited layer, its keys; and this process's share of the outputs that should not change, which the same
        forward passes give, see ``encoder_outputs``.
    """
    read = partial(inputs_and_condition, method.pipeline, method.layers, method.stretches)
    outputs: list[Tensor] = []

    def inputs(part: Tokens) -> Mapping[str, Tensor]:
        keys, condition = read(part)
        outputs.extend(outputs_of(condition))
        return keys

    tokens = method.pipeline.tokenize(method.retain_prompts)
    retained = method.retained_keys(list(tokens.split(ENCODE_BATCH)), inputs, len(tokens))
    by_default = len(method.pipeline.texts) > 1 or not method.pipeline.texts[0].causal
    if by_default if method.retain_empty is None else method.retain_empty:
        for name, found in read(method.pipeline.tokenize([""]))[0].items():
            keys, own = found.flatten(0, 1), retained[name]
            assert own.moment is not None and own.largest_norm is not None
            retained[name] = replace(
                own,
                moment=own.moment + len(tokens) * second_moment(keys).cpu(),
                count=own.count + len(tokens) * len(keys),
                largest_norm=max(own.largest_norm, largest_norm(keys)),
            )
    return retained, outputs


def encoder_outputs(method: ValueRefinement) -> list[Tensor]:
    """This process's share of outputs that should not change, float32, of the retained prompts of ``method``.

    These are what the denoiser reads: states (B, L, D), and pooled vectors (B, P) if there are any.
    """
    tokens = method.pipeline.tokenize(method.retain_prompts)
    parts = method.processes.own_share(list(tokens.split(ENCODE_BATCH)))
    return [tensor for part in parts for tensor in outputs_of(method.pipeline.condition(part))]


def outputs_of(condition: Condition) -> list[Tensor]:
    """What the denoiser reads, float32: states (B, L, D), and pooled vectors (B, P) if there are any."""
    return [part.float() for part in (condition.states, condition.pooled) if part is not None]


def drift(before: Sequence[Tensor], now: Sequence[Tensor], processes: Processes) -> float:
    """Norm of the difference of outputs ``now`` from ``before``, relative to the norm of ``before``.

    Args:
        before: This process's share of the outputs, as they should be.
        now: The same outputs after an edit.
        processes: The processes that share them.
    """
    sums = torch.zeros(2, device=processes.module.device)
    for old, new in zip(before, now, strict=True):
        sums += torch.stack([(new - old).square().sum(), old.square().sum()])
    moved, norm = processes.total(sums).sqrt()
    return float(moved / norm)
