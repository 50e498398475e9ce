"""What text encoders give for retained prompts, which should not change, and by how much it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.methods.shared.layer_state import outputs_of

if TYPE_CHECKING:
    from lit_unlearn.methods.shared.processes import Processes
    from lit_unlearn.methods.value_refinement import ValueRefinement


def encoder_outputs(method: ValueRefinement) -> list[Tensor]:
    """This process's share of outputs that should not change, float32, of the retained prompts of ``method``.

    These are what the denoiser reads: states (B, L, D), and pooled vectors (B, P) if there are any.
    """
    tokens = method.pipeline.tokenize(method.retain_prompts)
    parts = method.processes.own_share(list(tokens.split(ENCODE_BATCH)))
    return [tensor for part in parts for tensor in outputs_of(method.pipeline.condition(part))]


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
