"""Edits whose strength can be moved: weights between the unedited ones, the edited ones, and beyond."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.edits.checkpoint import Edit, load_with_pretrained
from lit_unlearn.system.names import check_numbers, check_prompts
from lit_unlearn.system.pixels import to_pil

MIN_SIDE = 256
"""Smaller pictures are enlarged to this many pixels."""
KEPT = 64
"""Unedited pictures that are kept, since moving the strength leaves them as they are."""
Pictures = list[Image.Image]


def scaled(before: Tensor, after: Tensor, strength: float) -> Tensor:
    """``before + strength (after - before)``; at 0 and 1 exactly the one and the other."""
    if strength in (0, 1):
        return after if strength else before
    return before + strength * (after - before)


class AdjustableEdits:
    """One loaded model that takes any of several edits, at any strength.

    Args:
        base: The model that all edits were made on.
        edits: The edits.
        device: Where the model is loaded.

    Raises:
        ValueError: An edit does not fit the model, or two were made in different precisions.
    """

    def __init__(self, base: BaseModel, edits: Sequence[Edit], device: torch.device) -> None:
        if len({edit.dtype for edit in edits}) > 1:
            kinds = ", ".join(f"{edit.path} {str(edit.dtype).removeprefix('torch.')}" for edit in edits)
            raise ValueError(f"The edits were made in different precisions ({kinds}): show edits of one.")
        self.edits = edits
        self.pipeline: Pipeline | None = None
        for edit in edits:  # each is checked against the model, whose weights are left as they are
            self.pipeline, pretrained = load_with_pretrained(base, edit, device)
        assert self.pipeline is not None
        self.parameters = self.pipeline.named_parameters()
        last = pretrained.values
        names = {name for edit in edits for name in edit.weights}
        self.before = {
            name: last[name] if name in last else self.parameters[name].detach().to("cpu", copy=True) for name in names
        }

    @torch.no_grad()
    def take(self, number: int | None, strength: float = 1.0) -> Pipeline:
        """The pipeline with edit ``number`` at ``strength``; None for none."""
        assert self.pipeline is not None
        after = {} if number is None else self.edits[number].weights
        for name, before in self.before.items():
            value = scaled(before, after[name], strength) if name in after else before
            self.parameters[name].copy_(value.to(self.parameters[name]))
        return self.pipeline


class Drawer:
    """Draws a prompt without an edit and with it, from the same seeds.

    Args:
        edits: The loaded model with its edits.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of classifier-free guidance.
    """

    def __init__(self, edits: AdjustableEdits, num_inference_steps: int, guidance_scale: float) -> None:
        self.edits, self.num_inference_steps, self.guidance_scale = edits, num_inference_steps, guidance_scale
        self.unedited: dict[tuple[str, int], Image.Image] = {}
        self.alone = threading.Lock()  # there is one model, whose weights are set for each picture

    def __call__(self, number: int, prompt: str, strength: float, seed: int, count: int) -> tuple[Pictures, Pictures]:
        """Pictures before and after edit ``number``.

        Raises:
            ValueError: The prompt is empty or names a file, or ``count`` is below 1.
        """
        if not prompt.strip():
            raise ValueError("The prompt is empty: write what to draw.")
        check_prompts([prompt])
        check_numbers(count=count)
        seeds = range(seed, seed + count)
        with self.alone:
            new = [one for one in seeds if (prompt, one) not in self.unedited]
            if new:
                for one, picture in zip(new, self.draw(None, 0.0, prompt, new), strict=True):
                    self.unedited[prompt, one] = picture
            before = [self.unedited[prompt, one] for one in seeds]
            for old in list(self.unedited)[: max(0, len(self.unedited) - KEPT)]:
                del self.unedited[old]
            return before, self.draw(number, strength, prompt, seeds)

    def draw(self, number: int | None, strength: float, prompt: str, seeds: Sequence[int]) -> Pictures:
        """Pictures of ``prompt`` at one setting of the weights, enlarged if they are small."""
        pipeline = self.edits.take(number, strength)
        pictures = pipeline.draw([prompt] * len(seeds), list(seeds), self.num_inference_steps, self.guidance_scale)
        factor = -(-MIN_SIDE // min(pictures.shape[-2:]))
        found = [to_pil(picture) for picture in pictures]
        return [
            picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            for picture in found
        ]
