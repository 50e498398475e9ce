"""EraseDiff (Wu et al., 2024), in the form that the SISS reference compares to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lit_unlearn.core.importance import erase_diff_scale, global_norm
from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs, square_error


class EraseDiff(DataUnlearning):
    """Keeps training on the pictures to keep, and trains the model to predict uniform noise on the pictures to forget.

    Uniform noise is compared with the noise that follows from what the model predicts, noise or velocity.

    ``g = g_x + max(η − ⟨g_x, g_a⟩ / ‖g_a‖², 0) g_a``: adds just enough of ``g_a`` to lower the forget loss too.

    Args:
        eta: η, the smallest decrease of the forget loss, in units of ``‖g_a‖²``.
        **kwargs: See ``DataUnlearning``.
    """

    def __init__(self, eta: float = 1e-2, **kwargs: object) -> None:
        if eta <= 0:
            raise ValueError(f"model.eta={eta} must be positive: with 0 the forget loss need not decrease.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.eta = eta

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``‖ε_θ(x_t) − ε‖²`` and ``‖ε_θ(a_t) − u‖²`` with u uniform in [0, 1)."""
        yield self.noise_error(pairs.keep, pairs, pairs.keep_condition)
        noise = self.pipeline.noise
        a_t = noise.add(pairs.forget, pairs.noise, pairs.timesteps)
        output = self.pipeline.predict(a_t, pairs.timesteps, pairs.forget_condition)
        yield square_error(noise.noise_of(output, a_t, pairs.timesteps), pairs.uniform)

    def combine(self, keep: list[Tensor], forget: list[Tensor]) -> list[Tensor]:
        """``g_x`` plus as much of ``g_a`` as is needed to lower the forget loss."""
        scale = erase_diff_scale(keep, forget, self.eta)
        self.log_dict(
            {"train/norm_keep": global_norm(keep), "train/norm_forget": global_norm(forget), "train/scale": scale}
        )
        return [g_x + scale * g_a for g_x, g_a in zip(keep, forget, strict=True)]
