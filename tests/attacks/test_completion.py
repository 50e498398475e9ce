from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.completion import Completion
from lit_unlearn.diffusion.base_model import BaseModel

Attacked = Callable[..., AttackedModel]
BOTH = "layers.1.mlp.fc2"
"""An edit of the text encoder, so that the two models also read prompts differently."""


def by_hand(model: AttackedModel, given: int, steps: int, rest: list[str], guided: bool, edited: bool) -> Tensor:
    """Pictures by two pipelines, with a sampler of diffusers."""
    changed, original = model.pipeline, copy.deepcopy(model.pipeline)
    for name, parameter in original.named_parameters().items():
        if name in model.pretrained.values:
            parameter.data.copy_(model.pretrained.values[name])
    scheduler = copy.deepcopy(model.pipeline.scheduler)  # type: ignore[attr-defined]
    scheduler.set_timesteps(steps)
    x = model.pipeline.initial_noise(model.seeds)
    for number, timestep in enumerate(scheduler.timesteps):
        pipeline = changed if number >= given and edited else original
        prompts = model.prompts if number < given else rest
        with torch.no_grad():
            noise = pipeline.predict(x, timestep, pipeline.encode(prompts))
            if number < given or guided:
                empty = pipeline.predict(x, timestep, pipeline.encode([""] * len(prompts)))
                noise = empty + model.guidance_scale * (noise - empty)
        x = scheduler.step(noise, timestep, x).prev_sample
    return model.pipeline.decode(x)


@pytest.mark.parametrize("edits", ["attn2.to_v", BOTH])
def test_each_model_takes_its_steps(edits: str, attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked(edits=edits)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = Completion(share=0.5, sampler_steps=4).run(model)
        pictures = found.draw(model.prompts, model.seeds)
        controls = {name: draw(model.prompts, model.seeds) for name, draw in found.controls.items()}
    prompts, empty = model.prompts, [""] * model.num_pictures
    # Float32 in batches of other sizes; a grey level is 4e-3.
    assert_close(pictures, by_hand(model, 2, 4, prompts, True, True), rtol=0, atol=1e-4)
    targets = ["one soccer ball"] * model.num_pictures
    assert_close(controls["target prompt"], by_hand(model, 2, 4, targets, True, True), rtol=0, atol=1e-4)
    assert_close(controls["empty prompt"], by_hand(model, 2, 4, empty, False, True), rtol=0, atol=1e-4)
    assert_close(controls["unedited, empty prompt"], by_hand(model, 2, 4, empty, False, False), rtol=0, atol=1e-4)
    different = [pictures, *controls.values(), by_hand(model, 0, 4, prompts, True, True)]
    different.append(by_hand(model, 4, 4, prompts, True, True))
    for place, one in enumerate(different):
        assert all((one - other).abs().max() > 1e-3 for other in different[:place])
    assert found.report == {"given_steps": 2, "total_steps": 4}
    assert found.text == "2 of 4 steps by the unedited model"
    # Guided pictures of 4 steps; the controls are not part of the cost.
    assert (found.cost.unet_forwards, found.cost.unet_backwards) == (2 * 4 * model.num_pictures, 0)


def test_an_edit_that_is_none_draws_what_it_draws(attacked: Attacked) -> None:
    model = attacked(edits="no weight", num_inference_steps=4)
    found = Completion(share=0.5, sampler_steps=4).run(model)
    assert torch.equal(found.draw(model.prompts, model.seeds), model.draw(model.prompts, model.seeds))


def test_its_number_of_steps_is_checked_before_a_model_is_loaded(attacked: Attacked) -> None:
    class Base:
        asked: tuple[object, ...] = ()

        def check_steps(self, *arguments: object) -> None:
            self.asked = arguments

    base = Base()
    Completion(sampler_steps=30).check_run(base, 8, 4.0)  # type: ignore[arg-type]
    assert base.asked == (30, "completion.sampler_steps")
    with pytest.raises(ValueError, match=r"completion\.sampler_steps=1001 of the model's DPMSolver.* not finite"):
        Completion(sampler_steps=1001).check_run(BaseModel.find("emoji-sd"), 8, 4.0)
