"""Inversion: the noise from which the edited model draws a given picture of the concept, without a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Draw, Found
from lit_unlearn.attacks.probing import (
    EMPTY,
    TARGET,
    check_ddim_steps,
    drawn_in_batches,
    kept,
    no_prompts,
    reference_rows,
    target_prompts,
)
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.ddim import DDIM

LEARNING_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Inversion(Attack):
    """Inverts pictures of the concept to noise with the edited model and the empty prompt, and draws from that noise.

    DDIM inversion without guidance (Song et al., 2021; with fixed-point iterations, Pan et al., 2023), then DDIM with
    the concept's prompts; of flow matching, the same with steps of Euler. With ``null_text_steps``, the condition that
    the guidance leads away from is optimised at each step so that the picture comes back (Mokady et al., 2023).
    Controls draw from the same noise with the target's prompts, and with the empty prompt and no guidance, which is the
    inversion itself backwards.

    Attributes:
        sampler_steps: Steps of DDIM, in both directions.
        iterations: Fixed-point iterations of a step of the inversion; 1 is the usual approximation.
        null_text_steps: Steps of Adam on the empty prompt's condition at each denoising step; 0 for none.
        learning_rate: Learning rate of that condition.
    """

    name: ClassVar[str] = "inversion"
    may_be_zero: ClassVar[tuple[str, ...]] = ("null_text_steps",)

    sampler_steps: int = 12
    iterations: int = 2
    null_text_steps: int = 0
    learning_rate: float = LEARNING_RATE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.null_text_steps and self.learning_rate != LEARNING_RATE:
            raise ValueError(
                f"{self.name}.learning_rate={self.learning_rate} has no effect without an optimisation: give "
                f"--{self.name}.null_text_steps too."
            )

    def check_run(self, base: BaseModel, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a number of steps that DDIM cannot take, and an optimisation of what guidance does not use."""
        check_ddim_steps(base, self.sampler_steps, f"{self.name}.sampler_steps")
        if self.null_text_steps and base.folder is not None and base.family.takes_guidance:
            raise ValueError(
                f"{self.name}.null_text_steps={self.null_text_steps} has no effect on {base.family.title}, whose "
                "guidance does not lead away from the empty prompt: leave it out."
            )
        if self.null_text_steps and guidance_scale == 1:
            raise ValueError(
                f"{self.name}.null_text_steps={self.null_text_steps} has no effect without guidance: leave it out, or "
                "give a --guidance_scale other than 1."
            )

    def search(self, model: AttackedModel) -> Found:
        """Invert the pictures to learn from, and draw from their noise."""
        pipeline, latents = model.pipeline, model.references.latents
        ddim = DDIM(pipeline, self.sampler_steps)
        with torch.no_grad():
            empty = pipeline.unskipped.encode([""]).expand(len(latents))
            chain = ddim.invert(empty, latents, self.iterations)
            again = ddim.sample([empty], chain[0], 1.0)
        error = float((again - latents).square().mean() / latents.square().mean())

        def targets(prompts: Sequence[str]) -> list[str]:
            return target_prompts(model.concept, prompts)

        controls = {
            TARGET: self._draw(model, ddim, chain, targets),
            EMPTY: self._draw(model, ddim, chain, no_prompts, is_guided=False),
        }
        if self.null_text_steps:
            controls["without null text"] = self._draw(model, ddim, chain, is_optimised=False)
        draw = kept(self._draw(model, ddim, chain), model.prompts, model.seeds)
        text = f"noise of {len(latents)} pictures, inverted in {self.sampler_steps} steps"
        return Found(text, draw, {"relative_error": error}, controls=controls)

    def _draw(
        self,
        model: AttackedModel,
        ddim: DDIM,
        chain: Sequence[Tensor],
        texts: Callable[[Sequence[str]], Sequence[str]] = list,
        is_guided: bool = True,
        is_optimised: bool = True,
    ) -> Draw:
        """Draws pictures from the noise of inverted ones; seeds do not matter, so no pair of both is drawn twice.

        Args:
            model: The attacked model.
            ddim: The sampler.
            chain: Inverted pictures to learn from.
            texts: From the judged prompts to the prompts that are drawn.
            is_guided: Whether to draw with the attacker's guidance; otherwise without any.
            is_optimised: Whether to optimise the empty prompt's condition, if that is wanted at all.
        """

        def part(prompts: list[str], seeds: list[int], numbers: range) -> Tensor:
            pipeline = model.pipeline
            rows = reference_rows(model, numbers)
            condition = pipeline.encode(texts(prompts))
            own = [latents[rows] for latents in chain]
            if not is_guided:
                drawn = ddim.sample([condition], own[0], 1.0)
            elif self.null_text_steps and is_optimised:
                drawn = self._optimised(model, ddim, own, condition)
            else:
                drawn = ddim.sample(model.guided(condition), own[0], model.guidance_scale)
            return pipeline.decode(drawn)

        draw_all = drawn_in_batches(part)

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            different = len(model.references.latents) * len(model.concept.direct)
            return draw_all(prompts[:different], seeds[:different])

        return draw

    def _optimised(self, model: AttackedModel, ddim: DDIM, chain: Sequence[Tensor], condition: Condition) -> Tensor:
        empty, _ = model.guided(condition)
        with torch.enable_grad():
            return ddim.null_text(
                chain,
                condition.detach(),
                empty.detach(),
                model.guidance_scale,
                self.null_text_steps,
                self.learning_rate,
            )
