"""The key of what was drawn: another one for everything that changes a bit of it, the same one for the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from helpers import load_copy
from lit_unlearn.diffusion.drawing import Drawing, library_versions
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.pipeline import Pipeline

STEPS, GUIDANCE = 3, 4.0


def key(pipeline: StableDiffusion, steps: int = STEPS, guidance_scale: float = GUIDANCE) -> str:
    return Drawing.of(pipeline, steps, guidance_scale).key


def other(value: Any) -> Any:
    """Some other value of the same kind."""
    if isinstance(value, dict):
        return {**value, "more": 1}
    return value + 1 if isinstance(value, int | float) else f"{value}?"


@pytest.mark.parametrize("name", [field.name for field in fields(Drawing)])
def test_every_field_is_in_the_key(name: str, components: StableDiffusion) -> None:
    drawing = Drawing.of(components, STEPS, GUIDANCE)
    assert replace(drawing, **{name: other(getattr(drawing, name))}).key != drawing.key


def test_every_argument_of_a_drawing_is_in_the_key(components: StableDiffusion) -> None:
    # A picture's own are in the name of its file: see the caches. The batch size is in neither, see ``Drawing``.
    arguments = set(inspect.signature(Pipeline.draw).parameters) - {"self", "prompts", "seeds", "batch_size"}
    changes: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.5}
    assert arguments == set(changes)
    same: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    for name, value in changes.items():
        assert Drawing.of(components, **{**same, name: value}).key != Drawing.of(components, **same).key


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_of_every_part_are_in_the_key(part: str, components: StableDiffusion) -> None:
    before, latents = key(components), Drawing.of(components, STEPS, GUIDANCE, decoded=False)
    with torch.no_grad():
        list(components.parts[part].parameters())[-1].add_(1e-3)
    assert key(components) != before
    # Latents are drawn without the autoencoder.
    assert (Drawing.of(components, STEPS, GUIDANCE, decoded=False) == latents) == (part == "vae")


CONFIGURATIONS = [
    ("unet", "act_fn", "gelu"),
    ("unet", "sample_size", 16),
    ("vae", "scaling_factor", 0.5),
    ("vae", "force_upcast", False),
    ("scheduler", "beta_end", 0.02),
    ("scheduler", "timestep_spacing", "trailing"),
    ("scheduler", "algorithm_type", "sde-dpmsolver++"),
]


@pytest.mark.parametrize(("part", "name", "value"), CONFIGURATIONS)
def test_configurations_are_in_the_key(part: str, name: str, value: Any, components: StableDiffusion) -> None:
    before = key(components)
    getattr(components, part).register_to_config(**{name: value})
    assert key(components) != before


def test_the_sampler_and_the_text_encoder_s_activation_are_in_the_key(components: StableDiffusion) -> None:
    keys = [key(components)]
    components.text_encoder.config.hidden_act = "gelu"
    keys.append(key(components))
    components.scheduler = DDIMScheduler.from_config(components.scheduler.config)
    keys.append(key(components))
    assert len(set(keys)) == 3


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "surroundings",
    [
        default_dtype,
        matmul_precision,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ],
)
def test_precision_is_in_the_key(surroundings: Callable[[], Any], components: StableDiffusion) -> None:
    before = key(components)
    with surroundings():
        inside = key(components)
    assert inside != before
    assert key(components) == before


def test_the_type_of_the_weights_is_in_the_key(tiny_sd: Path) -> None:
    keys = {key(load_copy(tiny_sd, dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(keys) == 3


@pytest.mark.parametrize("library", sorted(library_versions()))
def test_versions_are_in_the_key(library: str, components: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(components)
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    assert key(components) != before


def test_the_same_is_the_same_wherever_it_is_asked(tiny_sd: Path) -> None:
    assert set(library_versions()) == {"torch", "diffusers", "transformers", "lit_unlearn"}
    assert key(load_copy(tiny_sd)) == key(load_copy(tiny_sd))
