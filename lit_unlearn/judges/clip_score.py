"""CLIP score (Hessel et al., 2021): how well pictures fit their prompts.

The one of torchmetrics accepts only names of models on the hub and does not work with transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_unlearn.judges.clip import MODEL, normalised
from lit_unlearn.system.pixels import to_pil


class ClipScore(Metric):
    """Mean of ``100 max(cos(picture, prompt), 0)`` over pictures.

    Args:
        model: Hub id or folder of a CLIP model.
        revision: Branch, tag or commit, if ``model`` is a hub id.
        **kwargs: Passed on to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[Tensor]

    def __init__(self, model: str = MODEL, revision: str | None = None, **kwargs: Any) -> None:
        from transformers import CLIPModel, CLIPProcessor

        super().__init__(**kwargs)
        options: dict[str, Any] = {"revision": revision} if revision else {}
        self.processor = CLIPProcessor.from_pretrained(model, **options)
        self.model = CLIPModel.from_pretrained(model, use_safetensors=True, **options).eval()
        self.add_state("scores", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add ``images`` (B, 3, H, W), float in [0, 1], and their B prompts."""
        pictures = self.processor(images=[to_pil(image) for image in images.cpu()], return_tensors="pt")
        text = self.processor(text=list(prompts), padding=True, truncation=True, return_tensors="pt")
        device = self.model.device
        image_features = normalised(self.model.get_image_features(**pictures.to(device)).pooler_output)
        text_features = normalised(self.model.get_text_features(**text.to(device)).pooler_output)
        self.scores.append(100 * (image_features * text_features).sum(dim=-1).clamp(min=0).float())

    def compute(self) -> Tensor:
        """The mean score, nan if there were no pictures."""
        scores = dim_zero_cat(self.scores) if len(self.scores) else torch.zeros(0)
        return scores.cpu().double().mean()
