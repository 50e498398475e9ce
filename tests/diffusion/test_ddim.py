from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.ddim import DDIM, move, move_straight, posterior_noise, posterior_noise_straight
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.sampling import count_forwards, seeded

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 4


@pytest.fixture(params=["tiny_sd", "tiny_sd2", "tiny_pixart"])
def any_pipeline(request: pytest.FixtureRequest) -> StableDiffusion:
    return load_copy(str(request.getfixturevalue(request.param)))


def latents(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=seeded("latents"))


def test_a_step_is_the_papers_formula_in_float64() -> None:
    x, noise = torch.randn(2, 1, 4, 2, 2, generator=seeded(0), dtype=torch.float64)
    old, new = 0.2, 0.45
    eta_one = posterior_noise(old, new)
    assert eta_one == pytest.approx(((1 - new) / (1 - old)) ** 0.5 * (1 - old / new) ** 0.5, abs=1e-15)
    for fresh in (0.0, eta_one):
        picture = (x - (1 - old) ** 0.5 * noise) / old**0.5
        expected = new**0.5 * picture + (1 - new - fresh**2) ** 0.5 * noise
        assert_close(move(x, noise, old, new, fresh), expected, rtol=0, atol=1e-14)
    assert_close(move(move(x, noise, old, new), noise, new, old), x, rtol=0, atol=1e-14)  # and back
    assert (move(x, noise, old, new) - move(x, noise, old, new, eta_one)).abs().max() > 1e-2


def test_a_straight_step_in_float64() -> None:
    picture, noise = torch.randn(2, 1, 4, 2, 2, generator=seeded(0), dtype=torch.float64)
    old, new, velocity = 0.8, 0.55, noise - picture
    x = (1 - old) * picture + old * noise
    assert_close(move_straight(x, velocity, old, new), x + (new - old) * velocity, rtol=0, atol=1e-14)  # Euler
    # The posterior of x_new given x_old and the picture, by Bayes: precisions of both add up.
    ratio = (1 - old) / (1 - new)
    precision = 1 / new**2 + ratio**2 / (old**2 - (ratio * new) ** 2)
    fresh = posterior_noise_straight(old, new)
    assert fresh == pytest.approx(precision**-0.5, abs=1e-14)
    mean = ((1 - new) * picture / new**2 + ratio * x / (old**2 - (ratio * new) ** 2)) / precision
    assert_close(move_straight(x, velocity, old, new, fresh), mean, rtol=0, atol=1e-13)
    assert posterior_noise_straight(1.0, 0.5) == 0.5  # from noise alone, all noise is drawn anew
    assert posterior_noise_straight(0.5, 0.0) == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_of_flow_matching_it_is_the_models_sampler_and_back(tiny_sd3: Path, guidance_scale: float) -> None:
    pipeline = load_copy(str(tiny_sd3))
    condition, noise = pipeline.encode(PROMPTS).detach(), pipeline.initial_noise(SEEDS)
    expected = pipeline.sample(condition, noise, STEPS, guidance_scale)
    ddim = DDIM(pipeline, STEPS)
    found = ddim.sample(pipeline.guided(condition, guidance_scale), noise, guidance_scale)
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if guidance_scale == 1:
        near, far = (ddim.invert(condition, expected, iterations)[0] - noise for iterations in (60, 1))
        assert near.abs().max() < 1e-4 < 1e-1 < far.abs().max()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_without_noise_it_is_the_sampler(any_pipeline: StableDiffusion, guidance_scale: float) -> None:
    condition, noise = any_pipeline.encode(PROMPTS).detach(), any_pipeline.initial_noise(SEEDS)
    expected = any_pipeline.with_sampler("ddim").sample(condition, noise, STEPS, guidance_scale)
    found = DDIM(any_pipeline, STEPS).sample(any_pipeline.guided(condition, guidance_scale), noise, guidance_scale)
    # Float32 in another order of operations, relative to the largest latent.
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_noise_of_scale_one_is_that_of_eta_one(any_pipeline: StableDiffusion) -> None:
    condition, noise = any_pipeline.encode(PROMPTS).detach(), any_pipeline.initial_noise(SEEDS)
    scheduler = any_pipeline.with_sampler("ddim").scheduler
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(STEPS)
    generators = [seeded("step", seed) for seed in SEEDS]
    x = noise
    for timestep in scheduler.timesteps:
        drawn = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        with torch.no_grad():
            output = any_pipeline.predict(x, timestep, condition)
        x = scheduler.step(output, timestep, x, eta=1.0, variance_noise=drawn).prev_sample
    ddim, again = DDIM(any_pipeline, STEPS), [seeded("step", seed) for seed in SEEDS]
    found = ddim.sample([condition], noise, 1.0, scale=1.0, generators=again)
    assert_close(found, x, rtol=0, atol=1e-4 * float(x.abs().max()))  # float32, divided by small levels
    more = ddim.sample([condition], noise, 1.0, scale=1.5, generators=[seeded("step", seed) for seed in SEEDS])
    assert (more - found).abs().max() > 0.1


def test_extra_noise_is_added_to_the_mean_of_ddpm() -> None:
    """Of a denoiser that sees no noise, the noise that is left is that of the steps: its spread follows the scale."""

    class Blind(DDIM):
        def prediction(self, x: Tensor, *_: object) -> Tensor:
            return torch.zeros_like(x)

    pipeline = load_copy("emoji-sd")
    noise = torch.zeros(64, 1, 12, 12)
    spreads = []
    for scale in (1.0, 2.0):
        generators = [seeded("scale", number) for number in range(len(noise))]
        drawn = Blind(pipeline, 1).sample([], noise, 1.0, scale, generators)
        spreads.append(float(drawn.std()))
    levels = DDIM(pipeline, 1).levels
    assert spreads[0] == pytest.approx(posterior_noise(levels[0], levels[1]), rel=0.05)  # 9216 numbers
    assert spreads[1] == pytest.approx(2 * spreads[0], rel=1e-5)


def test_inversion_ends_where_the_chain_begins(any_pipeline: StableDiffusion) -> None:
    ddim, empty = DDIM(any_pipeline, STEPS), any_pipeline.encode([""]).expand(2).detach()
    pictures = latents()
    errors, chains = [], []
    for iterations in (1, 20):
        with count_forwards(any_pipeline.denoiser) as forwards:
            chains.append(ddim.invert(empty, pictures, iterations))
        assert forwards.count == 2 * STEPS * iterations
        again = ddim.sample([empty], chains[-1][0], 1.0)
        errors.append(float((again - pictures).abs().max()))
    assert errors[1] < 1e-3 * float(pictures.abs().max())  # a fixed point, in float32
    assert errors[0] > 10 * errors[1]
    assert len(chains[1]) == STEPS + 1
    assert torch.equal(chains[1][-1], pictures)


def test_a_usual_inversion_is_that_of_the_paper(any_pipeline: StableDiffusion) -> None:
    empty, ddim = any_pipeline.encode([""]).expand(2).detach(), DDIM(any_pipeline, STEPS)
    alphas = any_pipeline.scheduler.alphas_cumprod.double()
    times = [1, 251, 501, 751]  # leading, with an offset of 1
    assert ddim.timesteps.tolist() == times[::-1]
    x, level = latents(), alphas[0]
    for timestep in times:
        with torch.no_grad():
            output = any_pipeline.predict(x.float(), torch.tensor(timestep), empty)
        noise = any_pipeline.noise.noise_of(output, x.float(), torch.tensor([timestep] * 2)).double()
        following = alphas[timestep]
        x = following.sqrt() * (x - (1 - level).sqrt() * noise) / level.sqrt() + (1 - following).sqrt() * noise
        level = following
    found = ddim.invert(empty, latents())[0]
    assert_close(found.double(), x, rtol=0, atol=1e-4)


def test_null_text_brings_the_picture_back(any_pipeline: StableDiffusion, tmp_path: Path) -> None:
    ddim, condition = DDIM(any_pipeline, STEPS), any_pipeline.encode(PROMPTS).detach()
    empty = any_pipeline.encode([""]).expand(2).detach()
    chain = ddim.invert(empty, latents(), 5)
    for parameter in any_pipeline.denoiser.parameters():
        assert not parameter.requires_grad

    def error(found: Tensor) -> float:
        return float((found - latents()).square().mean())

    before = error(ddim.sample([empty, condition], chain[0], 4.0))
    with count_forwards(any_pipeline.denoiser) as forwards:
        found = ddim.null_text(chain, condition, empty, 4.0, steps=8, learning_rate=0.05)
    assert (forwards.count, forwards.backward) == (2 * STEPS * (8 + 2), 2 * STEPS * 8)
    assert error(found) < 0.7 * before
    # Every picture is optimised for itself.
    alone = ddim.null_text([x[:1] for x in chain], condition[:1], empty[:1], 4.0, steps=8, learning_rate=0.05)
    assert_close(found[:1], alone, rtol=0, atol=1e-3)  # Adam divides small gradients, which rounding changes


def test_the_first_step_of_null_text_follows_the_gradient(components: StableDiffusion) -> None:
    """One step of Adam moves each number of the condition by its learning rate, against the gradient's sign."""
    ddim, condition = DDIM(components, 1), components.encode(PROMPTS[:1]).detach()
    empty = components.encode([""]).detach()
    chain = ddim.invert(empty, latents(1))
    states = empty.states.clone().requires_grad_(True)
    timestep, (old, new) = ddim.timesteps[0], ddim.levels

    def end(states: Tensor) -> Tensor:
        first, second = (ddim.prediction(chain[0], timestep, [Condition(s)], 1.0) for s in (states, condition.states))
        return move(chain[0], first + 4.0 * (second - first), old, new)

    (gradient,) = torch.autograd.grad((end(states) - chain[1]).square().mean(), [states])
    expected = end(empty.states - 0.5 * gradient / (gradient.abs() + 1e-8))
    found = ddim.null_text(chain, condition, empty, 4.0, steps=1, learning_rate=0.5)
    moved = float((expected - end(empty.states)).abs().max())
    assert moved > 1e-2
    assert_close(found, expected, rtol=0, atol=0.01 * moved)  # rounding changes gradients of nearly zero
