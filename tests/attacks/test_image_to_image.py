from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from lit_unlearn.attacks import probing
from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel
from lit_unlearn.attacks.image_to_image import ImageToImage
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.image_to_image import image_to_image

Attacked = Callable[..., AttackedModel]


def test_pictures_of_the_concept_are_drawn_again(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    model = attacked(num_inference_steps=4, negative_prompt="a cat")
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = ImageToImage(strength=0.5).run(model)
        pictures = found.draw(model.prompts, model.seeds)
        controls = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
    pipeline, latents = model.pipeline, model.references.latents[:3]
    negative, expected = pipeline.encode(["a cat"]), {}
    own, target, empty = ("", "one dog", 4.0), ("target prompt", "one soccer ball", 4.0), ("empty prompt", "", 1.0)
    for name, prompt, scale in (own, target, empty):
        condition = pipeline.encode([prompt] * 3).detach()
        drawn = image_to_image(pipeline, condition, latents, model.seeds, 4, scale, 0.5, negative)
        expected[name] = pipeline.decode(drawn)
    assert_close(pictures, expected[""], rtol=0, atol=1e-5)
    for name, drawn in controls.items():
        assert_close(drawn, expected[name], rtol=0, atol=1e-5)
        assert (drawn - pictures).abs().max() > 1e-3
    assert list(controls) == ["target prompt", "empty prompt"]
    assert (pictures - model.draw(model.prompts, model.seeds)).abs().max() > 1e-2
    # The pictures to learn from, and two guided steps of four for each judged picture.
    assert found.cost.unet_forwards == NUM_REFERENCES * 2 * 4 + 3 * 2 * 2
    assert found.report == {"taken_steps": 2}


def test_every_picture_to_learn_from_is_used(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attacked(num_pictures=12)
    seen: list[torch.Tensor] = []

    def look(pipeline: object, condition: object, latents: torch.Tensor, *arguments: object) -> torch.Tensor:
        seen.append(latents)
        return image_to_image(pipeline, condition, latents, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(probing, "image_to_image", look)
    ImageToImage().search(model)
    assert [len(latents) for latents in seen] == [10, 2]
    assert torch.equal(torch.cat(seen), torch.cat([model.references.latents, model.references.latents[1:3]]))


def test_less_than_a_step_is_refused_before_a_model_is_loaded() -> None:
    base = BaseModel.find("emoji-sd")
    ImageToImage(strength=0.13).check_run(base, 8, 4.0)
    with pytest.raises(
        ValueError,
        match=r"image_to_image\.strength=0\.1 of num_inference_steps=8 is less than one step: .* at least 0\.12",
    ):
        ImageToImage(strength=0.1).check_run(base, 8, 4.0)
