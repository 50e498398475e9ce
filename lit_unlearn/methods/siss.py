"""SISS (Alberti et al., ICLR 2025), and the methods it is compared to that also subtract the forget loss.

All minimise the loss on pictures to keep minus the loss on pictures to forget, combined by ``Subtraction``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_unlearn.core.importance import importance_weights, log_density_ratio, mixture_noises
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs, square_error
from lit_unlearn.methods.shared.subtraction import Combination, Subtraction


def forward_mixture(pipeline: Pipeline, pairs: Pairs) -> Tensor:
    """The denoiser's output (B, C, H, W) at m, which is x_t or a_t, with the caption of the picture m was made from."""
    chosen = pairs.from_forget.view(-1, 1, 1, 1)
    m = pipeline.noise.add(torch.where(chosen, pairs.forget, pairs.keep), pairs.noise, pairs.timesteps)
    condition = Condition.where(pairs.from_forget, pairs.forget_condition, pairs.keep_condition)
    return pipeline.predict(m, pairs.timesteps, condition)


class TwoPass(DataUnlearning):
    """Prop. 1 directly: one forward on a noised picture to keep and another on a noised picture to forget.

    Args:
        combination: How the two gradients are combined; see ``Subtraction``.
        scaling: See ``Subtraction``.
        **kwargs: See ``DataUnlearning``.
    """

    def __init__(self, combination: Combination = "fraction", scaling: float = 0.1, **kwargs: object) -> None:
        self.subtraction = Subtraction(combination, scaling)
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.draws_from_all = self.subtraction.by_formula

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``‖ε_θ(x_t) − ε‖²`` and ``‖ε_θ(a_t) − ε‖²``, with the same noise and timestep."""
        keep, forget = self.subtraction.coefficients(pairs.n, pairs.k)
        yield keep * self.noise_error(pairs.keep, pairs, pairs.keep_condition)
        yield forget * self.noise_error(pairs.forget, pairs, pairs.forget_condition)


class SISS(DataUnlearning):
    """Subtracted importance-sampled scores: one forward at m, from the mixture of x_t and a_t, gives both losses.

    If x and a have different captions, the mixture consists of pairs (m, caption). The caption shows whether m comes
    from x or from a, so the weights are 1/(1−λ) and 0, or 0 and 1/λ, as in ``Bernoulli``.

    Args:
        combination: How the two gradients are combined; see ``Subtraction``.
        scaling: See ``Subtraction``.
        mixture: λ, how often the UNet sees the picture to forget.
        **kwargs: See ``DataUnlearning``.

    Raises:
        ValueError: λ is not between 0 and 1.
    """

    def __init__(
        self, combination: Combination = "fraction", scaling: float = 0.1, mixture: float = 0.5, **kwargs: object
    ) -> None:
        if not 0 <= mixture <= 1:
            raise ValueError(f"model.mixture={mixture} must lie between 0 and 1, e.g. 0.5.")
        self.subtraction = Subtraction(combination, scaling)
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.mixture, self.draws_from_all = mixture, self.subtraction.by_formula
        self.shares_graph = not self.subtraction.by_formula

    def on_fit_start(self) -> None:
        """Encode pictures and captions.

        Raises:
            ValueError: λ is 0 or 1 and a pair may have two captions, one of which the model would never see.
        """
        if self.mixture in (0, 1) and self.images.pairing != "caption":
            raise ValueError(
                f"model.mixture={self.mixture:g} needs pairs with one caption: set data.pairing to caption, or choose "
                "a mixture between 0 and 1."
            )
        super().on_fit_start()

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``w_x ‖ε_θ(m) − ε_x‖²`` and ``w_a ‖ε_θ(m) − ε_a‖²``."""
        target = self.pipeline.noise.target
        alpha, sigma = self.noise_levels(pairs)
        noise_keep, noise_forget = mixture_noises(
            pairs.keep.float(), pairs.forget.float(), pairs.noise.float(), pairs.from_forget, alpha, sigma
        )
        ratio = log_density_ratio(noise_keep, noise_forget)
        certain = torch.where(pairs.from_forget, torch.inf, -torch.inf).to(ratio)
        ratio = torch.where(pairs.same_caption.to(ratio.device), ratio, certain)
        weights = importance_weights(ratio, self.mixture)
        weight_keep, weight_forget = (weight.float().to(pairs.keep.device) for weight in weights)
        output = forward_mixture(self.pipeline, pairs)
        keep = square_error(output, target(pairs.keep.float(), noise_keep, pairs.timesteps))
        forget = square_error(output, target(pairs.forget.float(), noise_forget, pairs.timesteps))
        yield from self.subtraction.losses(weight_keep * keep, weight_forget * forget, pairs.n, pairs.k)


class Bernoulli(DataUnlearning):
    """One forward without importance weights: each pair uses one random side, divided by that side's probability.

    Args:
        combination: How the two gradients are combined; see ``Subtraction``.
        scaling: See ``Subtraction``.
        mixture: λ, how often the UNet sees the picture to forget.
        **kwargs: See ``DataUnlearning``.

    Raises:
        ValueError: λ is not strictly between 0 and 1; at 0 or 1 the model would never see one of the sides.
    """

    def __init__(
        self, combination: Combination = "fraction", scaling: float = 0.1, mixture: float = 0.5, **kwargs: object
    ) -> None:
        if mixture in (0, 1):
            raise ValueError(f"model.mixture={mixture:g} never shows the model one of the sides: choose e.g. 0.5.")
        if not 0 < mixture < 1:
            raise ValueError(f"model.mixture={mixture} must lie between 0 and 1, e.g. 0.5.")
        self.subtraction = Subtraction(combination, scaling)
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.mixture, self.draws_from_all = mixture, self.subtraction.by_formula
        self.shares_graph = not self.subtraction.by_formula

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``1[m = x_t] / (1−λ) ‖ε_θ(m) − ε‖²`` and ``1[m = a_t] / λ ‖ε_θ(m) − ε‖²``."""
        latents = torch.where(pairs.from_forget.view(-1, 1, 1, 1), pairs.forget, pairs.keep)
        target = self.pipeline.noise.target(latents, pairs.noise, pairs.timesteps)
        error = square_error(forward_mixture(self.pipeline, pairs), target)
        keep, forget = ~pairs.from_forget / (1 - self.mixture) * error, pairs.from_forget / self.mixture * error
        yield from self.subtraction.losses(keep, forget, pairs.n, pairs.k)
