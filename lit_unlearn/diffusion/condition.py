"""What a denoiser is told about prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told about prompts, row by row; it is indexed, put together and moved as one tensor is.

    Attributes:
        states: ``encoder_hidden_states``, (B, L, D).
        pooled: One vector for each prompt, (B, P), if the family has one.
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
        """``count`` times the only row there is, without a copy; as many rows as there are stay as they are."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """As ``Tensor.to``."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Condition:
        """As ``Tensor.detach``."""
        return self._each(Tensor.detach)

    def split(self, size: int | Sequence[int]) -> list[Condition]:
        """As ``Tensor.split``, along the rows."""
        states = self.states.split(size)  # type: ignore[arg-type]
        pooled = [None] * len(states) if self.pooled is None else self.pooled.split(size)  # type: ignore[arg-type]
        return [Condition(*parts) for parts in zip(states, pooled, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """All rows of ``parts``, one below the other."""
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
