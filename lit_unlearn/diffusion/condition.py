"""The condition of a denoiser: encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Encoded prompts for a denoiser, one row per prompt; it can be indexed, concatenated and moved like a tensor.

    Attributes:
        states: ``encoder_hidden_states``, (B, L, D).
        pooled: One vector for each prompt, (B, P), if the model family uses one.
    """

    states: Tensor
    pooled: Tensor | None = None

    def _each(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(function(self.states), None if self.pooled is None else function(self.pooled))

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Condition:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Condition:
        """Repeat a single row ``count`` times, without a copy; a condition of ``count`` rows stays as it is."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """As ``Tensor.to``."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Condition:
        """As ``Tensor.detach``."""
        return self._each(Tensor.detach)

    def split(self, size: int | Sequence[int]) -> list[Condition]:
        """As ``Tensor.split``, over the rows."""
        states = self.states.split(size)  # type: ignore[arg-type]
        pooled = [None] * len(states) if self.pooled is None else self.pooled.split(size)  # type: ignore[arg-type]
        return [Condition(*parts) for parts in zip(states, pooled, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate the rows of ``parts``."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Condition(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)

    @staticmethod
    def where(chosen: Tensor, first: Condition, second: Condition) -> Condition:
        """Rows of ``first`` where ``chosen`` (B,) is true, and of ``second`` elsewhere."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b)

        if first.pooled is None or second.pooled is None:
            return Condition(pick(first.states, second.states))
        return Condition(pick(first.states, second.states), pick(first.pooled, second.pooled))
