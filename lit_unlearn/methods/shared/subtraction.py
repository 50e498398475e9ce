"""How SISS and similar methods subtract the gradient of the forget loss: ``g = g_x − s g_a``."""

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
    """Combines two losses or gradients: keep minus forget.

    Attributes:
        combination: How the gradients are combined: ``fraction`` (the subtracted gradient has a fixed fraction of the
            norm of the other, in every step), ``norm`` (it has a fixed norm, as in the reference code), or ``formula``
            (``n/(n−k) g_x − k/(n−k) g_a``, the paper's Prop. 1, with x drawn from keep and forget together).
        scaling: The fraction or the norm; not used with ``formula``.

    Raises:
        ValueError: ``scaling`` is not positive.
    """

    combination: Combination
    scaling: float

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise ValueError(f"model.scaling={self.scaling} must be positive: 0 does not forget anything.")

    @property
    def by_formula(self) -> bool:
        """Whether the losses have Prop. 1's coefficients, so that one backward of their sum is enough."""
        return self.combination == "formula"

    def coefficients(self, n: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B,) of the two losses: those of Prop. 1 for ``formula``, otherwise 1, since gradients are scaled.

        Args:
            n: Number of pictures, including those to forget, (B,).
            k: Number of pictures to forget, (B,).
        """
        return deletion_coefficients(n, k) if self.by_formula else (torch.ones_like(n), torch.ones_like(n))

    def losses(self, keep: Tensor, forget: Tensor, n: Tensor, k: Tensor) -> Iterator[Tensor]:
        """Yield two losses (B,) of one forward, each with its coefficient; for ``formula`` only their difference."""
        keep_coefficient, forget_coefficient = self.coefficients(n, k)
        if self.by_formula:
            yield keep_coefficient * keep - forget_coefficient * forget
        else:
            yield keep_coefficient * keep
            yield forget_coefficient * forget

    def combine(self, keep: list[Tensor], forget: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """``g_x − s g_a`` and s, which is 1 for ``formula``, whose losses already have their coefficients."""
        scale = torch.ones(())
        if self.combination == "fraction":
            scale = subtraction_scale(keep, forget, fraction=self.scaling)
        elif self.combination == "norm":
            scale = subtraction_scale(keep, forget, norm=self.scaling)
        return [g_x - scale.to(g_x) * g_a for g_x, g_a in zip(keep, forget, strict=True)], scale
