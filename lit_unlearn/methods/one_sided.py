"""Data unlearning that looks at one side only: NegGrad at what is forgotten, naive deletion at what is kept."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs


class NegGrad(DataUnlearning):
    """Ascends the training loss of what is forgotten (Golatkar et al., 2020).

    Args:
        superfactor: Weight of that loss. A clipped gradient or Adam takes little notice of it.
        **kwargs: See ``DataUnlearning``.
    """

    def __init__(self, superfactor: float = 1.0, **kwargs: object) -> None:
        if superfactor <= 0:
            raise ValueError(f"model.superfactor={superfactor} must be positive: with 0 nothing is forgotten.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.superfactor = superfactor

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``−superfactor ‖ε_θ(a_t) − ε‖²``."""
        yield -self.superfactor * self.noise_error(pairs.forget, pairs, pairs.forget_condition)


class NaiveDeletion(DataUnlearning):
    """Goes on training on what is kept, as a model would that is trained without the rest."""

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``‖ε_θ(x_t) − ε‖²``."""
        yield self.noise_error(pairs.keep, pairs, pairs.keep_condition)
