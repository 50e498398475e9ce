"""Image to image (SDEdit, Meng et al., 2022): the edited model denoises noised pictures of the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_unlearn.attacks.base import Attack, AttackedModel, Found
from lit_unlearn.attacks.probing import check_strength, draw_from_references, kept, reference_controls
from lit_unlearn.diffusion.base_model import BaseModel


@dataclass(frozen=True, kw_only=True)
class ImageToImage(Attack):
    """Noises pictures of the concept by the unedited model, and has the edited model denoise them with its prompts.

    From Meng et al., "SDEdit", 2022. Controls do the same with the target's prompts, and with the empty prompt.

    Attributes:
        strength: Share of the denoising steps that are taken; 1 leaves hardly anything of the picture.
    """

    name: ClassVar[str] = "image_to_image"

    strength: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength > 1:
            raise ValueError(f"{self.name}.strength={self.strength} must be at most 1.")

    def check_run(self, base: BaseModel, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuse a strength that is less than one step."""
        check_strength(f"{self.name}.strength", self.strength, num_inference_steps)

    def search(self, model: AttackedModel) -> Found:
        """Draw the pictures."""
        draw = draw_from_references(model, self.strength)
        taken = model.pipeline.noise.steps_taken(model.num_inference_steps, self.strength)
        return Found(
            f"pictures of the concept, noised for {taken} of {model.num_inference_steps} steps",
            kept(draw, model.prompts, model.seeds),
            {"taken_steps": taken},
            controls=reference_controls(model, self.strength),
        )
