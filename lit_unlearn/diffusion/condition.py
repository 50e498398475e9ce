"""The condition of a denoiser: encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Encoded prompts for a denoiser, one row per prompt; it can be indexed, concatenated and moved like a tensor.

    Attributes:
        states: ``encoder_hidden_states``, (B, L, D).
        pooled: One vector for each prompt, (B, P), if the model family uses one.
        mask: Positions that the denoiser reads, (B, L) bool; None for all. The states at other positions are 0.
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def _each(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(*(None if tensor is None else function(tensor) for tensor in self._tensors))  # type: ignore[arg-type]

    @property
    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.states, self.pooled, self.mask

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Condition:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Condition:
        """Repeat a single row ``count`` times, without a copy; a condition of ``count`` rows stays as it is."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """As ``Tensor.to``; the mask stays of its own type."""
        moved = replace(self, mask=None)._each(lambda tensor: tensor.to(*args, **kwargs))
        return moved if self.mask is None else replace(moved, mask=self.mask.to(moved.states.device))

    def detach(self) -> Condition:
        """As ``Tensor.detach``."""
        return self._each(Tensor.detach)

    def split(self, size: int | Sequence[int]) -> list[Condition]:
        """As ``Tensor.split``, over the rows."""
        states = self.states.split(size)  # type: ignore[arg-type]
        others = [
            [None] * len(states) if tensor is None else tensor.split(size)  # type: ignore[arg-type]
            for tensor in self._tensors[1:]
        ]
        return [Condition(*parts) for parts in zip(states, *others, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate the rows of ``parts``."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return Condition(
            torch.cat([part.states for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(masks) if masks else None,
        )

    @staticmethod
    def where(chosen: Tensor, first: Condition, second: Condition) -> Condition:
        """Rows of ``first`` where ``chosen`` (B,) is true, and of ``second`` elsewhere."""

        def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if a is None or b is None:
                return None
            return torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b)

        return Condition(*map(pick, first._tensors, second._tensors))  # type: ignore[arg-type]
