from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.inpainting import Inpainting, middle
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.image_to_image import image_to_image

Attacked = Callable[..., AttackedModel]


@pytest.mark.parametrize(("height", "width", "share"), [(12, 12, 0.5), (64, 64, 0.25), (64, 96, 0.3), (8, 8, 0.01)])
def test_the_mask_is_in_the_middle(height: int, width: int, share: float) -> None:
    mask = middle(height, width, share)
    assert mask.shape == (1, 1, height, width)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    rows, columns = mask[0, 0].any(dim=1).nonzero().flatten(), mask[0, 0].any(dim=0).nonzero().flatten()
    assert mask.sum() == len(rows) * len(columns)  # a rectangle
    assert abs((height - 1) / 2 - float(rows.float().mean())) <= 0.5
    assert abs((width - 1) / 2 - float(columns.float().mean())) <= 0.5
    assert float(mask.mean()) == pytest.approx(share, abs=0.07)
    assert middle(64, 64, 0.25).sum() == 32 * 32  # as in the paper


def test_only_the_middle_is_drawn_anew(attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked()
    drawn: list[torch.Tensor] = []
    decode = model.pipeline.decode

    def look(latents: torch.Tensor) -> torch.Tensor:
        drawn.append(latents)
        return decode(latents)

    with untouched(model.pipeline):  # type: ignore[attr-defined]
        references = model.references.latents
        model.pipeline.decode = look  # type: ignore[method-assign]
        found = Inpainting(masked=0.25).run(model)
        controls = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
        pictures = found.draw(model.prompts, model.seeds)
    mask = middle(8, 8, 0.25)
    assert found.report == {"masked_share": 0.25}
    assert found.text == "pictures of the concept with 25% of the area masked"
    for latents in drawn:
        assert torch.equal(latents * (1 - mask), references[:3] * (1 - mask))
        assert ((latents - references[:3]) * mask).abs().max() > 0.1
    pipeline = model.pipeline
    condition = pipeline.encode(["one soccer ball"] * 3).detach()
    expected = image_to_image(pipeline, condition, references[:3], model.seeds, 2, 4.0, 1.0, mask=mask)
    assert_close(controls["target prompt"], decode(expected), rtol=0, atol=1e-5)
    assert (controls["target prompt"] - pictures).abs().max() > 1e-3
    assert (controls["empty prompt"] - pictures).abs().max() > 1e-3


def test_less_than_a_step_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"inpainting\.strength=0\.3 of num_inference_steps=2 is less than one step"):
        Inpainting(strength=0.3).check_run(BaseModel.find("emoji-sd"), 2, 4.0)
