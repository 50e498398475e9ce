"""SISS (Alberti et al., ICLR 2025) and what it is compared with that also subtracts the loss of what is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lit_unlearn.core.importance import (
    deletion_coefficients,
    global_norm,
    importance_weights,
    log_density_ratio,
    mixture_noises,
    subtraction_scale,
)
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs, square_error


class Subtraction(DataUnlearning):
    """Base of the methods that descend the loss of what is kept minus that of what is forgotten: ``g = g_x − s g_a``.

    Args:
        combination: How the gradients are combined: ``fraction`` (the subtracted gradient has a fixed fraction of the
            norm of the other, in every step), ``norm`` (it has a fixed norm, as in the reference code), or ``formula``
            (``n/(n−k) g_x − k/(n−k) g_a``, the paper's Prop. 1, with x drawn from keep and forget together).
        scaling: That fraction or norm; of no meaning for ``formula``.
        **kwargs: See ``DataUnlearning``.
    """

    def __init__(
        self,
        combination: Literal["fraction", "norm", "formula"] = "fraction",
        scaling: float = 0.1,
        **kwargs: object,
    ) -> None:
        if scaling <= 0:
            raise ValueError(f"model.scaling={scaling} must be positive: with 0 nothing is forgotten.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.combination, self.scaling = combination, scaling
        self.draws_from_all = combination == "formula"

    def coefficients(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Weights (B,) of the two losses: those of Prop. 1, or 1 where their gradients are scaled."""
        if self.combination == "formula":
            return deletion_coefficients(pairs.n, pairs.k)
        return torch.ones_like(pairs.n), torch.ones_like(pairs.n)

    def combine(self, keep: list[Tensor], forget: list[Tensor]) -> list[Tensor]:
        """``g_x − s g_a``; s is 1 for ``formula``, whose coefficients the losses have already."""
        scale = torch.ones(())
        if self.combination == "fraction":
            scale = subtraction_scale(keep, forget, fraction=self.scaling)
        elif self.combination == "norm":
            scale = subtraction_scale(keep, forget, norm=self.scaling)
        self.log_dict(
            {"train/norm_keep": global_norm(keep), "train/norm_forget": global_norm(forget), "train/scale": scale}
        )
        return [g_x - scale.to(g_x) * g_a for g_x, g_a in zip(keep, forget, strict=True)]


class TwoPass(Subtraction):
    """Prop. 1 as it stands: a forward on a noised picture to keep and another on a noised picture to forget."""

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``‖ε_θ(x_t) − ε‖²`` and ``‖ε_θ(a_t) − ε‖²``, with the same noise and timestep."""
        keep, forget = self.coefficients(pairs)
        yield keep * self.noise_error(pairs.keep, pairs, pairs.keep_condition)
        yield forget * self.noise_error(pairs.forget, pairs, pairs.forget_condition)


class Mixture(Subtraction):
    """Base of the methods with one forward: on x or on a, as a coin with probability λ says for each pair.

    Args:
        mixture: λ, how often the UNet sees the picture to forget.
        **kwargs: See ``Subtraction``.
    """

    def __init__(self, mixture: float = 0.5, **kwargs: object) -> None:
        if not 0 <= mixture <= 1:
            raise ValueError(f"model.mixture={mixture} must lie between 0 and 1, e.g. 0.5.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.mixture = mixture
        self.shares_graph = self.combination != "formula"  # there the two losses are added up before the only backward

    def forward_mixture(self, pairs: Pairs) -> Tensor:
        """The UNet's output (B, C, H, W) at m, which is x_t or a_t, with the caption of what it was made from."""
        chosen = pairs.from_forget.view(-1, 1, 1, 1)
        m = self.pipeline.noise.add(torch.where(chosen, pairs.forget, pairs.keep), pairs.noise, pairs.timesteps)
        condition = Condition.where(pairs.from_forget, pairs.forget_condition, pairs.keep_condition)
        return self.pipeline.predict(m, pairs.timesteps, condition)

    def subtract(self, keep: Tensor, forget: Tensor, pairs: Pairs) -> Iterator[Tensor]:
        """The two losses (B,), each with its coefficient; for ``formula`` their difference."""
        keep_coefficient, forget_coefficient = self.coefficients(pairs)
        if self.combination == "formula":
            yield keep_coefficient * keep - forget_coefficient * forget
        else:
            yield keep_coefficient * keep
            yield forget_coefficient * forget


class SISS(Mixture):
    """Subtracted importance-sampled scores: one forward at m of the mixture of x_t and a_t serves both losses.

    Where x and a have different captions, the mixture is one of pairs (m, caption). These tell x from a for certain, so
    the weights are 1/(1−λ) and 0, or 0 and 1/λ, as in ``Bernoulli``.
    """

    def on_fit_start(self) -> None:
        """Encode pictures and captions.

        Raises:
            ValueError: λ is 0 or 1 and a pair may have two captions: one of them would never be seen.
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
        output = self.forward_mixture(pairs)
        keep = square_error(output, target(pairs.keep.float(), noise_keep, pairs.timesteps))
        forget = square_error(output, target(pairs.forget.float(), noise_forget, pairs.timesteps))
        yield from self.subtract(weight_keep * keep, weight_forget * forget, pairs)


class Bernoulli(Mixture):
    """One forward without importance weights: each pair counts for the side that the coin chose, over its probability.

    Raises:
        ValueError: λ is 0 or 1: one side would never be seen.
    """

    def __init__(self, mixture: float = 0.5, **kwargs: object) -> None:
        if mixture in (0, 1):
            raise ValueError(f"model.mixture={mixture:g} never shows the model one of the sides: choose e.g. 0.5.")
        super().__init__(mixture=mixture, **kwargs)

    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """``1[m = x_t] / (1−λ) ‖ε_θ(m) − ε‖²`` and ``1[m = a_t] / λ ‖ε_θ(m) − ε‖²``."""
        latents = torch.where(pairs.from_forget.view(-1, 1, 1, 1), pairs.forget, pairs.keep)
        target = self.pipeline.noise.target(latents, pairs.noise, pairs.timesteps)
        error = square_error(self.forward_mixture(pairs), target)
        yield from self.subtract(
            ~pairs.from_forget / (1 - self.mixture) * error, pairs.from_forget / self.mixture * error, pairs
        )
