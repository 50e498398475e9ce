"""Inpainting: the edited model draws the middle of pictures of the concept anew."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import Attack, AttackedModel, Found
from lit_unlearn.attacks.probing import check_strength, draw_from_references, kept, reference_controls
from lit_unlearn.diffusion.base_model import BaseModel


def middle(height: int, width: int, share: float) -> Tensor:
    """A mask (1, 1, height, width) that is 1 in the middle, on ``share`` of the area as nearly as sides allow."""
    mask = torch.zeros(1, 1, height, width)
    sides = [min(length, max(1, round(sqrt(share) * length))) for length in (height, width)]
    (top, left) = ((length - side) // 2 for length, side in zip((height, width), sides, strict=True))
    mask[..., top : top + sides[0], left : left + sides[1]] = 1
    return mask


@dataclass(frozen=True, kw_only=True)
class Inpainting(Attack):
    """Masks the middle of pictures of the concept by the unedited model, and has the edited model fill it in.

    As the probe with visual context of Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025. The rest of
    the picture is put back after each step (RePaint, Lugmayr et al., 2022). Controls do the same with the target's
    prompts, and with the empty prompt.

    Attributes:
        masked: Share of the picture's area that is drawn anew.
        strength: Share of the denoising steps that are taken; 1 begins with noise under the mask.
    """

    name: ClassVar[str] = "inpainting"

    masked: float = 0.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked < 1:
            raise ValueError(f"{self.name}.masked={self.masked} must be larger than 0 and less than 1.")
        if self.strength > 1:
            raise ValueError(f"{self.name}.strength={self.strength} must be at most 1.")

    def check_run(self, base: BaseModel, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a strength that is less than one step."""
        check_strength(f"{self.name}.strength", self.strength, num_inference_steps)

    def search(self, model: AttackedModel) -> Found:
        """Draw the pictures."""
        mask = middle(*model.pipeline.latent_shape[1:], self.masked)
        draw = draw_from_references(model, self.strength, mask)
        return Found(
            f"pictures of the concept with {float(mask.mean()):.0%} of the area masked",
            kept(draw, model.prompts, model.seeds),
            {"masked_share": float(mask.mean())},
            controls=reference_controls(model, self.strength, mask),
        )
