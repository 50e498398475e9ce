"""How the pictures of attacks are drawn and judged, and what their results are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel, Found
from lit_unlearn.reports.attack_results import KEY, AttackReport
from lit_unlearn.system.names import check_prompts, file_name


@dataclass(frozen=True)
class AttackDrawing:
    """How the attacker draws.

    Attributes:
        seed: Seed of pictures and searches.
        num_inference_steps: Denoising steps of every picture, the run's.
        guidance_scale: Guidance of the judged pictures.
        run_guidance_scale: Guidance of the run.
        negative_prompt: Prompt that the guidance leads away from; None for the empty one.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    run_guidance_scale: float
    negative_prompt: str | None = None

    @classmethod
    def chosen(
        cls,
        hyper_parameters: Mapping[str, Any],
        seed: int,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> AttackDrawing:
        """The attacker's choices, and those of the run where the attacker makes none.

        Args:
            hyper_parameters: Of the run.
            seed: As in the class.
            guidance_scale: The attacker's guidance, if it is another one than the run's.
            negative_prompt: As in the class.

        Raises:
            ValueError: A choice is wrong, or has no effect.
        """
        own = float(hyper_parameters.get("guidance_scale", 4.0))
        chosen = own if guidance_scale is None else float(guidance_scale)
        if not math.isfinite(chosen) or chosen < 0:
            whose = ", that of the run," if guidance_scale is None else ""
            raise ValueError(f"guidance_scale={chosen}{whose} must be zero or larger; 1 means no guidance.")
        if negative_prompt is not None:
            if not negative_prompt.strip():
                raise ValueError(
                    f"negative_prompt={negative_prompt!r} is the empty prompt, which is used anyway: leave it out."
                )
            if chosen == 1:
                raise ValueError(
                    f"negative_prompt={negative_prompt!r} has no effect with guidance_scale=1, which means no "
                    "guidance: give a larger --guidance_scale, or leave it out."
                )
            check_prompts([negative_prompt])
        return cls(seed, int(hyper_parameters.get("num_inference_steps", 15)), chosen, own, negative_prompt)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as values of JSON."""
        return asdict(self)

    @property
    def key(self) -> dict[str, Any]:
        """The settings that distinguish results of the same attack on the same concept."""
        return {name: value for name, value in self.settings.items() if name in KEY}

    @property
    def words(self) -> str:
        """What differs from the run's own way with seed 0, as it follows the name of an attack in a sentence."""
        parts = [f"seed {self.seed}"] if self.seed else []
        if self.guidance_scale != self.run_guidance_scale:
            parts.append(f"guidance {self.guidance_scale:g}")
        if self.negative_prompt is not None:
            parts.append(f"negative prompt {self.negative_prompt!r}")
        return f" with {', '.join(parts)}" if parts else ""


def result_name(report: AttackReport, attack: str, concept: str, how: AttackDrawing) -> str:
    """Name, without its ending, of the files of a result: ``dog_relearning``, ``dog_relearning_seed1_guidance7.5``.

    Files of results without ``run_guidance_scale`` have no seed in their names. If the file of another seed may be one
    of them, this one gets its seed in any case.
    """
    results = [result for result in report.attacks if (result.attack, result.concept) == (attack, concept)]
    unnamed = [result for result in results if "run_guidance_scale" not in result.settings]
    taken = any(result.settings.get("seed", how.seed) != how.seed for result in unnamed)
    parts = [file_name(concept), attack]
    if how.seed or taken:
        parts.append(f"seed{how.seed}")
    if how.guidance_scale != how.run_guidance_scale:
        parts.append(f"guidance{how.guidance_scale!r}".removesuffix(".0"))
    if how.negative_prompt is not None:
        parts.append(f"without_{file_name(how.negative_prompt)}")
    return "_".join(parts)


def judge_controls(model: AttackedModel, found: Found) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """Pictures (n, 3, H, W) of each control, and the judge's verdicts on those for which it gave an answer."""
    pictures = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
    answers = {name: model.answers(drawn) for name, drawn in pictures.items()}
    verdicts = {name: [bool(answer >= 0.5) for answer in each[~each.isnan()]] for name, each in answers.items()}
    return pictures, verdicts
