"""DDIM (Song et al., 2021) step by step: noise between its steps, and its inversion from pictures to noise.

A chain of ``Pipeline.chain`` goes from noise to pictures with any sampler. What is here needs the levels of noise
themselves, so it computes DDIM's steps from the denoiser's predictions, for noise or velocity.

A step finds picture and noise in x_t and puts them together again at the next level. On the straight path of flow
matching the same is a step of Euler along the velocity, so that chains, noise between steps and inversion carry over
(``move_straight``, ``posterior_noise_straight``); only the formulas of the levels differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.noise import Sampler
from lit_unlearn.diffusion.pipeline import Pipeline


def move(x: Tensor, noise_pred: Tensor, old: float, new: float, fresh: float = 0.0) -> Tensor:
    """Latents at another level of noise, in either direction (Song et al., 2021, Eq. 12, without its last term).

    Args:
        x: Latents at the level ``old``, (B, C, H, W).
        noise_pred: The noise in them, (B, C, H, W).
        old: Share of the picture in the variance of ``x``, the paper's alpha_t, in (0, 1).
        new: That of the result, alpha_(t-1).
        fresh: Standard deviation of the noise that is added afterwards, sigma_t.
    """
    picture = (x - math.sqrt(1 - old) * noise_pred) / math.sqrt(old)
    return math.sqrt(new) * picture + math.sqrt(max(0.0, 1 - new - fresh**2)) * noise_pred


def posterior_noise(old: float, new: float) -> float:
    """Standard deviation of the noise that DDPM adds in a step from level ``old`` to ``new`` (Eq. 16, eta = 1)."""
    return math.sqrt((1 - new) / (1 - old) * (1 - old / new))


def move_straight(x: Tensor, velocity: Tensor, old: float, new: float, fresh: float = 0.0) -> Tensor:
    """``move`` on the straight path; without ``fresh`` it is ``x + (new - old) velocity``.

    Args:
        x: Latents at the level ``old``, (B, C, H, W).
        velocity: Noise minus picture in them, (B, C, H, W).
        old: Share of the noise in ``x``, sigma, in (0, 1] or, towards noise, [0, 1).
        new: That of the result.
        fresh: Standard deviation of the noise that is added afterwards.
    """
    picture, noise = x - old * velocity, x + (1 - old) * velocity
    return (1 - new) * picture + math.sqrt(max(0.0, new**2 - fresh**2)) * noise


def posterior_noise_straight(old: float, new: float) -> float:
    """``posterior_noise`` on the straight path, for shares of the noise ``old`` > ``new``."""
    return new / old * math.sqrt(max(0.0, old**2 - ((1 - old) / (1 - new) * new) ** 2))


@dataclass(frozen=True)
class DDIM:
    """Chains of DDIM, with the timesteps of ``DDPM.with_sampler("ddim")``; of flow matching, with the model's own.

    Attributes:
        pipeline: The pipeline; its own sampler does not matter.
        num_inference_steps: Steps of a chain, N.
    """

    pipeline: Pipeline
    num_inference_steps: int

    @property
    def timesteps(self) -> Tensor:
        """Timesteps (N,), from noise to picture."""
        kind: Sampler = "model" if self.pipeline.flow else "ddim"
        return self.pipeline.noise.with_sampler(kind).timesteps(self.num_inference_steps).to(self.pipeline.device)

    @property
    def levels(self) -> list[float]:
        """Share of the picture in the variance before each step, and after the last one, N + 1 numbers.

        Of flow matching, the share of the noise in the latents.
        """
        if self.pipeline.flow:
            return [float(t) / self.pipeline.noise.num_timesteps for t in self.timesteps] + [0.0]
        timesteps = torch.cat([self.timesteps.cpu(), torch.zeros(1, dtype=torch.long)])
        alpha, _ = self.pipeline.noise.levels(torch.zeros((), dtype=torch.float64), timesteps)
        return [float(level) for level in alpha.flatten().square()]

    def prediction(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition], guidance_scale: float) -> Tensor:
        """The predicted noise in ``x`` (B, C, H, W), guided if there are two conditions; see ``Pipeline.guided``.

        Of flow matching, the predicted velocity.
        """
        count = len(conditions)
        pipeline = self.pipeline.told(guidance_scale) if count == 1 else self.pipeline
        several = torch.cat([x] * count).to(pipeline.dtype)
        output = pipeline.predict(several, timestep, Condition.cat(conditions))
        if not pipeline.flow:
            output = pipeline.noise.noise_of(output, several, timestep.expand(len(several)))
        first, *rest = output.chunk(count)
        return first + guidance_scale * (rest[0] - first) if rest else first

    def move(self, x: Tensor, prediction: Tensor, old: float, new: float, fresh: float = 0.0) -> Tensor:
        """``x`` (B, C, H, W) at the level ``new`` instead of ``old``; ``prediction`` as above."""
        return (move_straight if self.pipeline.flow else move)(x, prediction, old, new, fresh)

    @torch.no_grad()
    def sample(
        self,
        conditions: Sequence[Condition],
        noise: Tensor,
        guidance_scale: float,
        scale: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """Latents (B, C, H, W) of prompts.

        Args:
            conditions: From ``Pipeline.guided``.
            noise: Start of the chains, (B, C, H, W).
            guidance_scale: Strength of the guidance.
            scale: Noise of each step as a multiple of DDPM's: 0 for DDIM, 1 for DDPM, more for extra noise. Beyond 1
                the mean of a step is DDPM's, since DDIM's formula would need the root of a negative number.
            generators: One per picture, for the noise of the steps; not needed if ``scale`` is 0.
        """
        x, levels = noise.to(self.pipeline.device, self.pipeline.dtype), self.levels
        for number, timestep in enumerate(self.timesteps):
            old, new = levels[number], levels[number + 1]
            fresh = (posterior_noise_straight if self.pipeline.flow else posterior_noise)(old, new)
            prediction = self.prediction(x, timestep, conditions, guidance_scale)
            x = self.move(x, prediction, old, new, min(scale, 1.0) * fresh)
            if scale:
                drawn = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators]
                x = x + scale * fresh * torch.stack(drawn).to(x)
        return x

    @torch.no_grad()
    def invert(self, condition: Condition, latents: Tensor, iterations: int = 1) -> list[Tensor]:
        """The chains without guidance that lead to pictures, found from their ends (DDIM inversion).

        Args:
            condition: Condition of B prompts.
            latents: Latents of the pictures, (B, C, H, W).
            iterations: Fixed-point iterations of a step (Pan et al., 2023): 1 predicts the noise of a step at its end.

        Returns:
            Latents (B, C, H, W) before each step and after the last, N + 1 of them, the noise first.
        """
        x, levels = latents.to(self.pipeline.device, self.pipeline.dtype), self.levels
        chain = [x]
        for number in reversed(range(self.num_inference_steps)):
            timestep, old, new = self.timesteps[number], levels[number + 1], levels[number]
            found = x
            for _ in range(iterations):
                found = self.move(x, self.prediction(found, timestep, [condition], 1.0), old, new)
            x = found
            chain.insert(0, x)
        return chain

    def null_text(
        self,
        chain: Sequence[Tensor],
        condition: Condition,
        unconditional: Condition,
        guidance_scale: float,
        steps: int,
        learning_rate: float,
    ) -> Tensor:
        """Latents (B, C, H, W) at the end of guided chains that follow ``chain`` (Mokady et al., 2023, Algorithm 1).

        At each step, the condition that the guidance leads away from is optimised so that the step ends where that of
        ``chain`` does: its states, and its pooled vector if there is one. The next step begins there, with that
        condition. Unlike in the paper, learning rate and number of steps are the same for all steps. The denoiser must
        be frozen, and gradients enabled.

        Args:
            chain: Latents from ``invert``.
            condition: Condition of B prompts.
            unconditional: Condition to begin with, of B prompts.
            guidance_scale: Strength of the guidance.
            steps: Steps of Adam at each step.
            learning_rate: Its learning rate.
        """
        levels, x = self.levels, chain[0]
        fields = ["states", *([] if unconditional.pooled is None else ["pooled"])]
        tensors = [getattr(unconditional, field) for field in fields]
        empty = [tensor.detach().clone() for tensor in tensors]

        def after(number: int, x: Tensor, empty: list[Tensor], for_prompt: Tensor) -> Tensor:
            for_empty = self.prediction(
                x, self.timesteps[number], [replace(unconditional, **dict(zip(fields, empty, strict=True)))], 1.0
            )
            guided = for_empty + guidance_scale * (for_prompt - for_empty)
            return self.move(x, guided, levels[number], levels[number + 1])

        for number, timestep in enumerate(self.timesteps):
            with torch.no_grad():
                for_prompt = self.prediction(x, timestep, [condition], 1.0)
            empty = [tensor.detach().requires_grad_(True) for tensor in empty]
            optimizer = torch.optim.Adam(empty, lr=learning_rate)
            for _ in range(steps):
                errors = (after(number, x, empty, for_prompt) - chain[number + 1]).square().mean(dim=(1, 2, 3))
                for tensor, gradient in zip(empty, torch.autograd.grad(errors.sum(), empty), strict=True):
                    tensor.grad = gradient
                optimizer.step()
            with torch.no_grad():
                x = after(number, x, empty, for_prompt)
        return x
