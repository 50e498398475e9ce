"""Data unlearning with one loss only: NegGrad uses the pictures to forget, naive deletion the pictures to keep."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs


class NegGrad(DataUnlearning):
    """Gradient ascent on the training loss of the pictures to forget (Golatkar et al., 2020).

    Args:
        superfactor: Weight of that loss. It has little effect if the gradient is clipped, or with Adam.
        **kwargs: See ``DataUnlearning``.
    """

    def __init__(self, superfactor: float = 1.0, **kwargs: object) -> None:
        if superfactor <= 0:
            raise ValueError(f"model.superfactor={superfactor} must be positive: 0 does not forget anything.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.superfactor = superfactor

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``−superfactor ‖ε_θ(a_t) − ε‖²``."""
        yield -self.superfactor * self.noise_error(pairs.forget, pairs, pairs.forget_condition)


class NaiveDeletion(DataUnlearning):
    """Continues training on the pictures to keep only, as if the model had been trained without the others."""

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``‖ε_θ(x_t) − ε‖²``."""
        yield self.noise_error(pairs.keep, pairs, pairs.keep_condition)
