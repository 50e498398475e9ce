"""The noise process against its formulas, in float64, from the betas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy, normal
from lit_unlearn.diffusion.noise import DDPM, Flow

TIMESTEPS = torch.tensor([0, 1, 250, 999])
SHAPE = (len(TIMESTEPS), 4, 8, 8)


def process(prediction_type: str) -> DDPM:
    """That of Stable Diffusion, which predicts noise or velocity."""
    return DDPM(
        DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
        )
    )


def levels() -> tuple[Tensor, Tensor]:
    """``a_t = sqrt(abar_t)`` and ``s_t = sqrt(1 - abar_t)`` with ``abar_t = prod (1 - beta)``, (B, 1, 1, 1) each."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[TIMESTEPS].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def close(found: Tensor, expected: Tensor) -> None:
    """Equal as far as diffusers knows its levels: ``abar`` is float32, and ``1 - abar`` is 1e-3 at the first step."""
    assert found.dtype == expected.dtype == torch.float64
    assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_shares_of_picture_and_noise(prediction_type: str) -> None:
    alpha, sigma = process(prediction_type).levels(normal(*SHAPE), TIMESTEPS)
    assert alpha.shape == sigma.shape == (len(TIMESTEPS), 1, 1, 1)
    for found, expected in zip((alpha, sigma), levels(), strict=True):
        close(found, expected)
    # Float64 throughout: the two are one vector's sine and cosine.
    assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=0, atol=1e-15)
    half, _ = process(prediction_type).levels(normal(*SHAPE).bfloat16(), TIMESTEPS)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_noised_picture(prediction_type: str) -> None:
    latents, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    alpha, sigma = levels()
    close(process(prediction_type).add(latents, noise, TIMESTEPS), alpha * latents + sigma * noise)
    theirs = process(prediction_type).scheduler.add_noise(latents, noise, TIMESTEPS)
    assert_close(process(prediction_type).add(latents, noise, TIMESTEPS), theirs, rtol=0, atol=1e-12)


def test_the_target_is_the_noise_or_the_velocity() -> None:
    latents, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    alpha, sigma = levels()
    assert torch.equal(process("epsilon").target(latents, noise, TIMESTEPS), noise)
    velocity = process("v_prediction").target(latents, noise, TIMESTEPS)
    close(velocity, alpha * noise - sigma * latents)
    assert (velocity - noise).abs().max() > 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noise_is_found_again_in_a_perfect_output(prediction_type: str) -> None:
    own = process(prediction_type)
    latents, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    noisy, output = own.add(latents, noise, TIMESTEPS), own.target(latents, noise, TIMESTEPS)
    # a (a e - s x) + s (a x + s e) = (a^2 + s^2) e, in float64.
    assert_close(own.noise_of(output, noisy, TIMESTEPS), noise, rtol=0, atol=1e-12)
    other = normal(*SHAPE, seed=2)
    alpha, sigma = levels()
    expected = other if prediction_type == "epsilon" else alpha * other + sigma * noisy
    close(own.noise_of(other, noisy, TIMESTEPS), expected)


def test_timesteps_are_drawn_from_the_generator_alone() -> None:
    own = process("epsilon")
    assert own.num_timesteps == 1000
    generator, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    drawn = torch.stack([own.draw_timestep(generator) for _ in range(500)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, torch.stack([torch.randint(0, 1000, (), generator=plain) for _ in range(500)]))
    assert drawn.min() < 20
    assert drawn.max() > 980
    window = torch.stack([own.draw_timestep(generator, 300, 310) for _ in range(200)])
    assert set(window.tolist()) == set(range(300, 310))


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_its_sampler_keeps_no_state_and_can_be_another(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    own = load_copy(str(folder)).noise
    before = own.scheduler.timesteps.tolist()
    sampler: SchedulerMixin = own.scheduler.from_config(own.scheduler.config)
    sampler.set_timesteps(7)
    assert torch.equal(own.timesteps(7), sampler.timesteps)
    assert own.scheduler.timesteps.tolist() == before
    assert own.with_sampler("model") is own
    ddim = own.with_sampler("ddim")
    assert isinstance(ddim.scheduler, DDIMScheduler)
    assert ddim.timesteps(4).tolist() == [751, 501, 251, 1]
    # Another sampler of the same process.
    latents, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    for name in ("add", "target"):
        assert torch.equal(
            getattr(ddim, name)(latents, noise, TIMESTEPS), getattr(own, name)(latents, noise, TIMESTEPS)
        )


# --- flow matching


def flow(**config: object) -> Flow:
    return Flow(FlowMatchEulerDiscreteScheduler(**config), num_patches=1024)  # type: ignore[arg-type]


def test_flow_goes_straight_from_the_picture_to_noise() -> None:
    process, (latents, noise) = flow(shift=3.0), torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1000.0, 250.0, 1.0])
    noised = process.add(latents, noise, timesteps)
    assert torch.equal(noised[0], noise[0])
    assert_close(noised[1], 0.75 * latents[1] + 0.25 * noise[1], rtol=0, atol=1e-6)
    target = process.target(latents, noise, timesteps)
    assert_close(noised + (0.5 - timesteps / 1000).view(-1, 1, 1, 1) * target, (latents + noise) / 2, rtol=0, atol=1e-5)
    assert_close(process.noise_of(target, noised, timesteps), noise, rtol=0, atol=1e-5)
    picture, sigma = process.levels(latents.bfloat16(), timesteps)
    assert (picture.dtype, sigma.shape) == (torch.bfloat16, (3, 1, 1, 1))


def test_the_sampler_of_flow_ends_at_the_picture_if_the_velocity_is_right() -> None:
    process, (latents, noise) = flow(shift=3.0), torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler, x_t = process.sampler(5), noise
    for number, timestep in enumerate(sampler.timesteps):
        assert_close(process.at_step(latents, noise, 5, number), x_t, rtol=0, atol=1e-5)
        assert_close(process.add(latents, noise, timestep.view(1)), x_t, rtol=0, atol=1e-5)
        x_t = sampler.step(process.target(latents, noise, timestep), timestep, x_t).prev_sample
    assert_close(x_t, latents, rtol=0, atol=1e-5)
    assert torch.equal(process.at_step(latents, noise, 5, 5), latents)


def test_timesteps_of_flow_are_drawn_from_the_whole_range() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow().draw_timestep(generator) for _ in range(5000)])
    assert (int(drawn.min()), int(drawn.max())) == (1, 1000) and abs(float(drawn.float().mean()) - 500.5) < 15
    assert {int(flow().draw_timestep(generator, 3, 5)) for _ in range(50)} == {4, 5}


def test_flow_is_shifted_by_the_size_and_as_in_flux() -> None:
    dynamic = flow(use_dynamic_shifting=True)
    assert dynamic.step_arguments(4)["mu"] == pytest.approx(0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
    whole = Flow(dynamic.scheduler, 1024, whole_range=True)
    assert whole.step_arguments(4)["sigmas"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert len(whole.timesteps(4)) == 4


@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.7, 0), (0.5, 1), (0.34, 1), (0.33, 2)])
def test_flow_starts_where_diffusers_does(strength: float, start: int) -> None:
    assert flow().start_step(3, strength) == start
