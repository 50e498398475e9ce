"""An edited model under attack: the dog of ``tiny_sd``, its cross-attention moved a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import load_copy, weights
from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.parameters import PretrainedValues

STEPS = 2
"""Denoising steps of every picture here."""


class Yes:
    """A judge that sees the concept in every picture, and counts them."""

    name = "yes"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.asked += len(images)
        return torch.ones(len(images))


@pytest.fixture
def attacked(tiny_sd: Path, pets: str) -> Callable[..., AttackedModel]:
    """Makes the model; takes the arguments that shall differ, the folder of another pipeline, and a pattern."""

    def build(model: Path = tiny_sd, edits: str = "attn2.to_v", **arguments: Any) -> AttackedModel:
        components = load_copy(str(model))
        parameters = {name: p for name, p in components.named_parameters().items() if edits in name}
        pretrained = PretrainedValues(parameters)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=generator))
        defaults = {
            "concept": load_concept_set(pets).get("dog"),
            "judge": Yes(),
            "num_inference_steps": STEPS,
            "guidance_scale": 4.0,
            "num_pictures": 3,
        }
        return AttackedModel(components, pretrained, **{**defaults, **arguments})

    return build


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """Asserts that a block leaves all weights what they were, to the last bit, frozen and without gradients."""

    @contextmanager
    def check(components: StableDiffusion) -> Iterator[None]:
        before = weights(components)
        yield
        for name, parameter in components.named_parameters().items():
            assert torch.equal(parameter, before[name]), name
            assert not parameter.requires_grad
            assert parameter.grad is None

    return check


@pytest.fixture
def forwards_per_picture(components: StableDiffusion) -> int:
    """UNet forwards of a picture: guidance doubles the sampler's steps."""
    return 2 * len(components.noise.timesteps(STEPS))
