from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_unlearn.judges.clip_score import ClipScore
from lit_unlearn.system.pixels import to_pil


def test_clip_score_equals_the_model_s_own_logits(tiny_clip: Path) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a dog", "a cat in the rain", "an owl", "a castle at sunset", "a lemon"]
    metric = ClipScore(str(tiny_clip))
    inputs = metric.processor(text=prompts, images=[to_pil(i) for i in images], padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = metric.model(**inputs).logits_per_image.diagonal() / metric.model.logit_scale.exp()
    assert cosines.all()
    for sign in (1, -1):
        # Pictures that are the opposite of their prompts count 0, not less.
        expected = float((100 * (sign * cosines).clamp(min=0)).mean())
        metric.reset()
        metric.update(images[:2], prompts[:2])
        metric.update(images[2:], prompts[2:])
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            metric.model.visual_projection.weight.neg_()
