"""How SISS and its kin subtract the gradient of what is forgotten: ``g = g_x − s g_a``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_unlearn.core.importance import deletion_coefficients, subtraction_scale

Combination = Literal["fraction", "norm", "formula"]


@dataclass(frozen=True)
class Subtraction:
    """What is kept minus what is forgotten.

    Attributes:
        combination: How the gradients are combined: ``fraction`` (the subtracted gradient has a fixed fraction of the
            norm of the other, in every step), ``norm`` (it has a fixed norm, as in the reference code), or ``formula``
            (``n/(n−k) g_x − k/(n−k) g_a``, the paper's Prop. 1, with x drawn from keep and forget together).
        scaling: That fraction or norm; of no meaning for ``formula``.

    Raises:
        ValueError: ``scaling`` is not positive.
    """

    combination: Combination
    scaling: float

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise ValueError(f"model.scaling={self.scaling} must be positive: with 0 nothing is forgotten.")

    @property
    def by_formula(self) -> bool:
        """Whether the losses have Prop. 1's coefficients, so that they can be added up before the only backward."""
        return self.combination == "formula"

    def coefficients(self, n: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B,) of the two losses: those of Prop. 1, or 1 where their gradients are scaled.

        Args:
            n: How many pictures there are, those to forget among them, (B,).
            k: How many are to be forgotten, (B,).
        """
        return deletion_coefficients(n, k) if self.by_formula else (torch.ones_like(n), torch.ones_like(n))

    def losses(self, keep: Tensor, forget: Tensor, n: Tensor, k: Tensor) -> Iterator[Tensor]:
        """Two losses (B,) of one forward, each with its coefficient; for ``formula`` their difference."""
        keep_coefficient, forget_coefficient = self.coefficients(n, k)
        if self.by_formula:
            yield keep_coefficient * keep - forget_coefficient * forget
        else:
            yield keep_coefficient * keep
            yield forget_coefficient * forget

    def combine(self, keep: list[Tensor], forget: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """``g_x − s g_a`` and s, which is 1 for ``formula``: there the losses have their coefficients already."""
        scale = torch.ones(())
        if self.combination == "fraction":
            scale = subtraction_scale(keep, forget, fraction=self.scaling)
        elif self.combination == "norm":
            scale = subtraction_scale(keep, forget, norm=self.scaling)
        return [g_x - scale.to(g_x) * g_a for g_x, g_a in zip(keep, forget, strict=True)], scale
