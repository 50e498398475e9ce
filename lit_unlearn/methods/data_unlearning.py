"""Base of the data-unlearning methods: pairs of latents, and two separate gradients.

Data flow: before the first step the pictures to keep and to forget and their captions are encoded once, divided among
processes. A step takes a batch of pairs (x, a), in parts that fit in memory; each pair has one noise and one timestep.
A method's ``losses`` gives, per pair, a loss for the picture to keep and one for the picture to forget. Their gradients
are summed over the parts and over processes, ``combine`` makes one gradient of them, and its global norm is clipped.

Nothing of this depends on what the denoiser predicts. ``x_t = a_t x + s_t noise`` holds for flow matching too, with
``a_t = 1 - s_t``, and with it the noise that each picture of a pair would have at m, the ratio of their densities, and
the weights of SISS; the error is that of the velocity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.core.importance import choose_forget, global_norm
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.methods.shared.editor import check_timesteps
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.image_editor import ImageEditor
from lit_unlearn.methods.shared.subtraction import Subtraction


@dataclass
class Pairs:
    """Pairs of a picture to keep (x) and one to forget (a).

    Attributes:
        keep: Latents x, (B, C, H, W).
        forget: Latents a, (B, C, H, W).
        noise: The noise that both share, standard normal, (B, C, H, W).
        timesteps: The timestep that both share, (B,).
        keep_condition: Encoded captions of x.
        forget_condition: Encoded captions of a.
        same_caption: Whether x and a have the same caption, (B,), bool.
        from_forget: The mixture's choice: whether a is noised and given to the UNet instead of x, (B,), bool.
        uniform: Uniform noise in [0, 1), (B, C, H, W).
        n: Number of pictures that x and a were drawn from, (B,), float.
        k: Number of these pictures that should be forgotten, (B,), float.
    """

    keep: Tensor
    forget: Tensor
    noise: Tensor
    timesteps: Tensor
    keep_condition: Condition
    forget_condition: Condition
    same_caption: Tensor
    from_forget: Tensor
    uniform: Tensor
    n: Tensor
    k: Tensor


class DataUnlearning(GradientEditor, ImageEditor):
    """Base of the methods that unlearn pictures; a method adds ``losses`` and, if it has two losses, ``subtraction``.

    Args:
        min_timestep: Smallest timestep that is drawn.
        max_timestep: Largest timestep, exclusive.
        micro_batch_size: Number of pairs that pass through the UNet at once; null takes the whole batch. It changes the
            memory used, not the result.
        max_grad_norm: The combined gradient is scaled down to this norm if its norm is larger; null never scales.
        edited_parameters: Group or pattern of weights of the denoiser.
        **kwargs: See ``GradientEditor`` and ``ImageEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    mixture = 0.5
    """λ: how often the mixture chooses the picture to forget."""
    shares_graph = False
    """Whether the two losses come from one forward, whose graph must be kept after the first backward."""
    subtraction: Subtraction
    """How the gradient of the forget loss is subtracted, in a method with two losses."""
    draws_from_all = False
    """Whether x is drawn from X, the pictures to keep and to forget together."""

    def __init__(
        self,
        min_timestep: int = 0,
        max_timestep: int = 1000,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        edited_parameters: str = "full",
        **kwargs: object,
    ) -> None:
        check_timesteps(min_timestep, max_timestep)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"model.micro_batch_size={micro_batch_size} must be at least 1, or null.")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"model.max_grad_norm={max_grad_norm} must be positive, or null for no limit.")
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        self.automatic_optimization = False  # two gradients of one forward, separate until they are combined
        self.min_timestep, self.max_timestep = min_timestep, max_timestep
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm

    @property
    def fit_plan(self) -> FitPlan:
        """Pairs in an order that depends on the method's seed."""
        return FitPlan(seed=self.seed, draws_from_all=self.draws_from_all)

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of the denoiser that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        part = self.base.family.denoiser_part
        why = f": this method edits only the {part}; choose full or another group or pattern within {part}."
        return self.select_only(names, lambda name: name.startswith(f"{part}."), why)

    # --- fit

    def on_fit_start(self) -> None:
        """Encode pictures and captions.

        Raises:
            ValueError: The precision needs a loss scaler, which cannot be used with two gradients.
        """
        super().on_fit_start()
        if self.trainer.precision == "16-mixed":
            raise ValueError("trainer.precision=16-mixed scales one loss, not two: use bf16-mixed or 32-true.")
        pictures = [*self.images.keep, *self.images.forget]
        self.latents = self.processes.made_once(
            len(pictures), lambda numbers: self.encode_images([pictures[i] for i in numbers])
        )
        captions = sorted({picture.caption for picture in pictures})
        self.caption_of = torch.tensor([captions.index(picture.caption) for picture in pictures])
        with torch.no_grad():
            self.conditions = self.pipeline.encode_many(captions)

    def pairs(self, batch: Tensor, batch_idx: int) -> Pairs:
        """The pairs numbered in ``batch`` (B, 3), with random numbers that depend on the place in the global batch."""
        places, x, a = batch.cpu().unbind(dim=1)
        num_keep, shape = len(self.images.keep), self.latents.shape[1:]
        timesteps, noise, choice, uniform = [], [], [], []
        for generator in self.generators(places, batch_idx):
            timestep = self.pipeline.noise.draw_timestep(generator, self.min_timestep, self.max_timestep)
            timesteps.append(timestep)
            noise.append(torch.randn(shape, generator=generator))
            choice.append(torch.rand((), generator=generator))
            uniform.append(torch.rand(shape, generator=generator))
        counts = torch.tensor([self.images.counts(number) for number in a.tolist()], dtype=torch.float32)
        keep_caption, forget_caption = self.caption_of[x], self.caption_of[num_keep + a]
        latents = self.latents[x], self.latents[num_keep + a]
        return Pairs(
            *latents,
            noise=torch.stack(noise).to(latents[0]),
            timesteps=torch.stack(timesteps).to(self.device),
            keep_condition=self.conditions[keep_caption],
            forget_condition=self.conditions[forget_caption],
            same_caption=(keep_caption == forget_caption).to(self.device),
            from_forget=choose_forget(torch.stack(choice), self.mixture).to(self.device),
            uniform=torch.stack(uniform).to(latents[0]),
            n=counts[:, 0].to(self.device),
            k=counts[:, 1].to(self.device),
        )

    @abstractmethod
    def losses(self, pairs: Pairs) -> Iterator[Tensor]:
        """Losses (B,) of ``pairs``: one to minimise, or one for the pictures to keep and one for those to forget.

        If two losses come from separate forwards, the second is computed after the backward of the first, so that only
        one graph is in memory at a time.
        """

    def combine(self, keep: list[Tensor], forget: list[Tensor]) -> list[Tensor]:
        """Combine the gradients of the two losses into the gradient of the step, as ``subtraction`` says."""
        combined, scale = self.subtraction.combine(keep, forget)
        norms = {"train/norm_keep": global_norm(keep), "train/norm_forget": global_norm(forget)}
        self.log_dict({**norms, "train/scale": scale})
        return combined

    def noise_error(self, latents: Tensor, pairs: Pairs, condition: Condition, target: Tensor | None = None) -> Tensor:
        """The model's training loss, summed over a picture's numbers, (B,), on ``latents`` (B, C, H, W) of ``pairs``.

        Args:
            latents: x or a.
            pairs: Pairs with the noise and the timesteps to use.
            condition: Encoded captions.
            target: What the denoiser should predict; by default the noise or velocity.
        """
        noise = self.pipeline.noise
        if target is None:
            target = noise.target(latents, pairs.noise, pairs.timesteps)
        x_t = noise.add(latents, pairs.noise, pairs.timesteps)
        return square_error(self.pipeline.predict(x_t, pairs.timesteps, condition), target)

    def noise_levels(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """γ and σ of the timesteps of ``pairs``, each (B, 1, 1, 1), float32."""
        return self.pipeline.noise.levels(pairs.noise.float(), pairs.timesteps)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One optimizer step on the pairs numbered in ``batch`` (B, 3)."""
        optimizer: Any = self.optimizers()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sums: list[list[Tensor]] = []
        totals = torch.zeros(2, device=self.device)
        for part in batch.split(self.micro_batch_size or max(1, len(batch))):
            for number, loss in enumerate(self.losses(self.pairs(part, batch_idx))):
                totals[number] += loss.detach().sum() / len(batch)
                keep_graph = self.shares_graph and number == 0
                gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=keep_graph)
                if number == len(sums):
                    sums.append([gradient.float() for gradient in gradients])
                else:
                    torch._foreach_add_(sums[number], [gradient.float() for gradient in gradients])
                self.forwards.backward += len(part) if keep_graph else 0  # a second backward through this forward
        names = ["train/loss"] if len(sums) == 1 else ["train/loss_keep", "train/loss_forget"]
        losses = dict(zip(names, totals / self.latents[0].numel(), strict=False))
        self.log_losses(losses, batch)
        for total in sums:
            self.average(total)
        combined = sums[0] if len(sums) == 1 else self.combine(*sums)
        norm = global_norm(combined)
        self.log("train/gradient_norm", norm)
        if self.max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(combined, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for parameter, gradient in zip(parameters, combined, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()  # type: ignore[union-attr]

    def average(self, gradients: list[Tensor]) -> None:
        """Sum over processes and divide by the size of the global batch, in place."""
        if self.trainer.world_size > 1:  # DDP averages only the one gradient that ``backward`` writes
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = self.processes.total(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch._foreach_div_(gradients, float(self.images.batch_size))


def square_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error (B,), summed over all other dimensions, in float32."""
    return (output.float() - target.float()).square().flatten(1).sum(dim=1)
