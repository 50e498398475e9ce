"""Parts of a pipeline that are on the device only while they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.offload import Offload, bring, computing_device
from lit_unlearn.diffusion.pipeline import Pipeline

CPU = torch.device("cpu")


@pytest.fixture
def pipeline(tiny_sd: Path) -> Pipeline:
    return load_pipeline(str(tiny_sd))


def test_a_part_comes_when_it_is_called_and_goes_when_another_comes(pipeline: Pipeline) -> None:
    offload = Offload(pipeline.parts, CPU)
    with torch.no_grad():
        condition = pipeline.encode(["a dog"])
        assert offload.present == {"text_encoder"}
        latents = pipeline.draw_latents(condition, [0], 1, 1.0)
        assert offload.present == {"unet"}
        pipeline.decode(latents)
    assert offload.present == {"vae"} and not offload.held


def test_pictures_are_the_same(pipeline: Pipeline) -> None:
    before = pipeline.draw(["a dog"], [0], 2, 4.0)
    Offload(pipeline.parts, CPU)
    assert pipeline.draw(["a dog"], [0], 2, 4.0).equal(before)


def test_what_a_gradient_flows_through_stays_until_it_is_released(pipeline: Pipeline) -> None:
    offload = Offload(pipeline.parts, CPU)
    next(pipeline.parts["text_encoder"].parameters()).requires_grad_(True)
    condition = pipeline.encode(["a dog"])
    assert offload.held == {"text_encoder"}
    pipeline.predict(torch.zeros(1, *pipeline.latent_shape), torch.tensor(1), condition).sum().backward()
    assert offload.present == {"text_encoder", "unet"}
    offload.release()
    bring(pipeline.parts["vae"])
    assert offload.present == {"vae"}


def test_parts_stay_within_a_block(pipeline: Pipeline) -> None:
    offload = Offload(pipeline.parts, CPU)
    with torch.no_grad(), offload.holding(["unet"]):
        pipeline.encode(["a dog"])
        assert offload.present == {"text_encoder", "unet"}
    bring(pipeline.parts["vae"])
    assert offload.present == {"vae"}


def test_a_part_computes_on_the_device_of_its_offload(pipeline: Pipeline) -> None:
    assert pipeline.device == computing_device(pipeline.denoiser) == CPU
    Offload(pipeline.parts, torch.device("meta"))
    assert pipeline.device.type == "meta"
    assert next(pipeline.denoiser.parameters()).device == CPU


def test_other_weights_in_a_call_go_where_the_part_is(pipeline: Pipeline) -> None:
    name, own = next(iter(pipeline.denoiser.named_parameters()))
    x_t, t, condition = torch.ones(1, *pipeline.latent_shape), torch.tensor(1), pipeline.encode(["a dog"])
    with torch.no_grad():
        expected = pipeline.predict(x_t, t, condition, {name: own + 1})
        offload = Offload(pipeline.parts, CPU)
        assert pipeline.predict(x_t, t, condition, {name: own + 1}).equal(expected)
    assert offload.present == {"unet"}
