"""Noise-based probing (Lu et al., 2025): more noise in each denoising step, and the best of several tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Draw, Found
from lit_unlearn.attacks.probing import check_ddim_steps, drawn_in_batches, kept, target_prompts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.ddim import DDIM
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.evaluation.metrics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class NoiseProbe(Attack):
    """Draws each prompt several times with extra noise in every step, and keeps the picture that the judge rates best.

    From Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025. The best of several tries shows anything
    more often than a single one. Therefore the shares of single tries are reported as well, and the control is the same
    search with prompts of other concepts, which shows what the best of as many tries shows by chance.

    Attributes:
        scales: Standard deviation of the noise of a step, as multiples of DDPM's (of flow matching, of the posterior's
            on the straight path), each tried for every picture.
        tries: Number of tries with each scale.
    """

    name: ClassVar[str] = "noise_probe"
    learns_from_pictures: ClassVar[bool] = False

    scales: tuple[float, ...] = (1.0, 1.25, 1.5)
    tries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"{self.name}.scales={self.scales} must be positive numbers, at least one.")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"{self.name}.scales={self.scales} has one twice: give --{self.name}.tries instead.")

    def check_run(self, base: BaseModel, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a number of steps that DDIM cannot take."""
        check_ddim_steps(base, num_inference_steps, "num_inference_steps")

    def search(self, model: AttackedModel) -> Found:
        """Draw all tries, and keep the best of each picture."""
        rated: list[Tensor] = []
        draw = kept(self._best(model, rated), model.prompts, model.seeds)
        answers = torch.cat(rated, dim=1)
        by_scale = zip(self.scales, answers.split(self.tries), strict=True)
        report = {
            "single_try": _share(answers),
            "single_try_by_scale": {str(scale): _share(own) for scale, own in by_scale},
        }
        prompts = list(model.unrelated) or target_prompts(model.concept, model.concept.direct)
        chance = self._best(model)

        def by_chance(own: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return chance([prompts[i % len(prompts)] for i in range(len(own))], seeds)

        name = "unrelated prompts" if model.unrelated else "target prompts"
        return Found(f"best of {len(answers)} tries with more noise", draw, report, controls={name: by_chance})

    def _best(self, model: AttackedModel, rated: list[Tensor] | None = None) -> Draw:
        """Draws the best of all tries of each picture; appends the judge's answers, (tries, B), to ``rated``."""

        def part(prompts: list[str], seeds: list[int], numbers: range) -> Tensor:
            pipeline = model.pipeline
            chains = DDIM(pipeline, model.num_inference_steps)
            conditions = model.guided(pipeline.encode(prompts))
            noise = pipeline.initial_noise(seeds)
            pictures, answers = [], []
            for scale in self.scales:
                for number in range(self.tries):
                    generators = [seeded(self.name, seed, scale, number) for seed in seeds]
                    drawn = chains.sample(conditions, noise, model.guidance_scale, scale, generators)
                    pictures.append(pipeline.decode(drawn))
                    answers.append(model.answers(pictures[-1]))
            found = torch.stack(answers)
            if rated is not None:
                rated.append(found)
            best = found.nan_to_num(-1.0).argmax(dim=0)  # a picture without an answer is never the best
            return torch.stack(pictures)[best, torch.arange(len(best))]

        return drawn_in_batches(part)


def _share(answers: Tensor) -> dict[str, Any]:
    """Share of the ``answers`` that see the concept, of those that are not nan, and its interval."""
    verdicts = [bool(answer >= 0.5) for answer in answers[~answers.isnan()]]
    if not verdicts:
        return {"shown": None, "interval": [0.0, 1.0], "pictures": 0}
    low, high = wilson_interval(sum(verdicts), len(verdicts))
    return {"shown": sum(verdicts) / len(verdicts), "interval": [low, high], "pictures": len(verdicts)}
