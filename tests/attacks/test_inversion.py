from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel
from lit_unlearn.attacks.inversion import Inversion
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.ddim import DDIM

Attacked = Callable[..., AttackedModel]


def test_pictures_are_drawn_from_the_noise_of_others(attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked(negative_prompt="a castle")
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = Inversion(sampler_steps=4, iterations=10).run(model)
        pictures = found.draw(model.prompts, model.seeds)
        controls = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
    pipeline, references = model.pipeline, model.references.latents
    # The inversion backwards is the picture itself, by the edited model and without a prompt.
    assert list(controls) == ["target prompt", "empty prompt"]
    assert_close(controls["empty prompt"], pipeline.decode(references[:3]), rtol=0, atol=1e-2)
    assert found.report["relative_error"] < 1e-4
    assert (controls["empty prompt"] - pictures).abs().max() > 2e-2
    ddim = DDIM(pipeline, 4)
    noise = ddim.invert(pipeline.encode([""]).expand(NUM_REFERENCES).detach(), references, 10)[0]
    for drawn, prompt in ((pictures, "one dog"), (controls["target prompt"], "one soccer ball")):
        conditions = [pipeline.encode(["a castle"] * 3).detach(), pipeline.encode([prompt] * 3).detach()]
        assert_close(drawn, pipeline.decode(ddim.sample(conditions, noise[:3], 4.0)), rtol=0, atol=1e-4)
    # References; inversion and its check; guided pictures.
    expected = NUM_REFERENCES * 2 * 2 + NUM_REFERENCES * 4 * (10 + 1) + 3 * 4 * 2
    assert (found.cost.unet_forwards, found.cost.unet_backwards) == (expected, 0)


def test_null_text_brings_back_any_picture_with_any_prompt(
    attacked: Attacked, untouched: Callable[..., object]
) -> None:
    model = attacked()
    probe = Inversion(sampler_steps=4, iterations=5, null_text_steps=6)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = probe.run(model)
        controls = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
    assert list(controls) == ["target prompt", "empty prompt", "without null text"]
    original = model.pipeline.decode(model.references.latents[:3])
    errors = {name: float((drawn - original).square().mean()) for name, drawn in controls.items()}
    error = float((found.draw(model.prompts, model.seeds) - original).square().mean())
    assert error < 0.8 * errors["without null text"]
    assert errors["target prompt"] < 0.8 * errors["without null text"]
    plain = Inversion(sampler_steps=4, iterations=5).search(model)
    assert torch.equal(controls["without null text"], plain.draw(model.prompts, model.seeds))
    assert found.cost.unet_backwards == 3 * 4 * 6


def test_no_pair_of_picture_and_prompt_is_judged_twice(attacked: Attacked) -> None:
    model = attacked(num_pictures=13)  # one prompt and ten pictures
    found = Inversion(sampler_steps=1, iterations=1).search(model)
    pictures = found.draw(model.prompts, model.seeds)
    assert len(pictures) == NUM_REFERENCES
    assert len({picture.sum().item() for picture in pictures}) == NUM_REFERENCES


def test_what_has_no_effect_is_refused_before_a_model_is_loaded() -> None:
    base = BaseModel.find("emoji-sd")
    Inversion(null_text_steps=2, learning_rate=0.1).check_run(base, 8, 4.0)
    Inversion().check_run(base, 8, 1.0)
    with pytest.raises(ValueError, match=r"inversion\.null_text_steps=2 has no effect without guidance"):
        Inversion(null_text_steps=2).check_run(base, 8, 1.0)
    with pytest.raises(ValueError, match=r"inversion\.sampler_steps=2000 cannot be used with the model's DDIMSched"):
        Inversion(sampler_steps=2000).check_run(base, 8, 4.0)
