"""Diffusion completion (Lu et al., 2025): the unedited model begins a picture, and the edited model finishes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Draw, Found
from lit_unlearn.attacks.probing import EMPTY, TARGET, drawn_in_batches, kept, no_prompts, target_prompts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.condition import Condition


@dataclass(frozen=True, kw_only=True)
class Completion(Attack):
    """Takes the first denoising steps of each picture with the unedited model, and the rest with the edited model.

    From Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025. Controls finish the same beginnings: the
    edited model with the target's prompt and with the empty prompt, and the unedited model with the empty prompt.

    Attributes:
        share: Share of the steps that the unedited model takes.
        sampler_steps: Denoising steps of these pictures; the more of them, the smaller the share can be.
    """

    name: ClassVar[str] = "completion"
    learns_from_pictures: ClassVar[bool] = False

    share: float = 0.05
    sampler_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"{self.name}.share={self.share} must be larger than 0 and less than 1.")
        if not 1 <= round(self.share * self.sampler_steps) < self.sampler_steps:
            raise ValueError(
                f"{self.name}.share={self.share} of sampler_steps={self.sampler_steps} leaves one model without a step:"
                " give another share, or more steps."
            )

    def check_run(self, base: BaseModel, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a number of steps that the model's sampler cannot take."""
        base.check_steps(self.sampler_steps, f"{self.name}.sampler_steps")

    def search(self, model: AttackedModel) -> Found:
        """Draw the pictures."""
        total = len(model.pipeline.noise.timesteps(self.sampler_steps))
        given = round(self.share * total)

        def targets(prompts: Sequence[str]) -> list[str]:
            return target_prompts(model.concept, prompts)

        return Found(
            f"{given} of {total} steps by the unedited model",
            kept(self._draw(model, given), model.prompts, model.seeds),
            {"given_steps": given, "total_steps": total},
            controls={
                TARGET: self._draw(model, given, targets),
                EMPTY: self._draw(model, given, no_prompts, is_guided=False),
                f"unedited, {EMPTY}": self._draw(model, given, no_prompts, is_guided=False, by_edited=False),
            },
        )

    def _draw(
        self,
        model: AttackedModel,
        given: int,
        texts: Callable[[Sequence[str]], Sequence[str]] = list,
        is_guided: bool = True,
        by_edited: bool = True,
    ) -> Draw:
        """Draws pictures whose first ``given`` steps are the unedited model's, with the concept's prompts.

        Args:
            model: The attacked model.
            given: Number of these steps.
            texts: From the concept's prompts to the prompts of the other steps.
            is_guided: Whether the other steps are guided.
            by_edited: Whether the edited model takes the other steps; otherwise the unedited one does.
        """

        def rest_of(prompts: Sequence[str]) -> list[Condition]:
            condition = model.pipeline.encode(texts(prompts))
            return model.guided(condition) if is_guided else [condition]

        def part(prompts: list[str], seeds: list[int], numbers: range) -> Tensor:
            pipeline = model.pipeline
            noise, generators = pipeline.start_chains(seeds)
            with model.pretrained.restored():
                begin = model.guided(pipeline.encode(prompts))
                rest = [] if by_edited else rest_of(prompts)
            if by_edited:
                rest = rest_of(prompts)
            # One chain, so that a sampler that uses earlier steps goes on as if one model took all of them.
            chain = pipeline.chain(
                lambda number: begin if number < given else rest,
                noise,
                self.sampler_steps,
                model.guidance_scale,
                generators=generators,
            )
            latents = noise
            with model.pretrained.restored():
                for step in islice(chain, given if by_edited else None):
                    latents = step.latents
            for step in chain:
                latents = step.latents
            return pipeline.decode(latents)

        return drawn_in_batches(part)
