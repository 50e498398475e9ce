from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy, sample_latents
from lit_unlearn.core.objectives import esd_target
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.sampling import count_forwards
from lit_unlearn.diffusion.trajectories import (
    Place,
    ReuseSchedule,
    sample_chains,
    sample_state,
)

SCHEDULERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]
STEPS, GUIDANCE = 4, 3.0


def scheduler_of(name: str, components: StableDiffusion) -> Any:
    return getattr(diffusers, name).from_config(components.scheduler.config, clip_sample=False)


def with_scheduler(name: str, components: StableDiffusion) -> StableDiffusion:
    """``components`` with another sampler, at its defaults."""
    return replace(components, scheduler=scheduler_of(name, components))


def inputs(components: StableDiffusion) -> tuple[list[Condition], Tensor]:
    """Conditions of the empty prompt, of two prompts and of a third one, and noise."""
    with torch.no_grad():
        encoded = components.encode(["", "a dog at sunset", "an owl", "a cat"])
    return [encoded[[0, 0]], encoded[[1, 2]], encoded[[3, 3]]], components.initial_noise([7, 8])


@torch.no_grad()
def plain_loop(unet: Any, scheduler: Any, states: list[Tensor], noise: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """Classifier-free guidance as tutorials of diffusers write it, one forward for each condition."""
    scheduler.set_timesteps(STEPS)
    latents, visited = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t)
        preds = [unet(x, t, encoder_hidden_states=state).sample for state in states]
        visited.append([x, *preds])
        latents = scheduler.step(preds[0] + GUIDANCE * (preds[1] - preds[0]), t, latents).prev_sample
    return visited, latents


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_chains_keep_what_a_plain_loop_visits(model: str, scheduler: str, request: pytest.FixtureRequest) -> None:
    own = with_scheduler(scheduler, load_copy(str(request.getfixturevalue(model))))
    conditions, noise = inputs(own)
    states = [condition.states for condition in conditions]
    visited, end = plain_loop(own.unet, scheduler_of(scheduler, own), states, noise)
    chains = sample_chains(own, conditions, noise, STEPS, GUIDANCE)
    expected = torch.stack([torch.stack(parts, dim=1) for parts in visited], dim=1)
    assert chains.shape == (2, len(own.noise.timesteps(STEPS)), 1 + 3, 4, 8, 8)
    # The same operations in batches of other sizes: equal up to rounding.
    assert_close(chains, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    latents = sample_latents(own.unet, own.scheduler, states[1], states[0][:1], noise, STEPS, GUIDANCE)
    assert_close(latents, end, rtol=0, atol=1e-4 * float(end.abs().max()))
    # Neighbouring states and the predictions for different prompts differ by more than that.
    assert (chains[:, 1:, 0] - chains[:, :-1, 0]).abs().max() > 0.1
    assert (chains[:, :, 2] - chains[:, :, 1]).abs().max() > 0.1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_further_prediction_changes_no_chain(scheduler: str, components: StableDiffusion) -> None:
    own = with_scheduler(scheduler, components)
    conditions, noise = inputs(own)
    two, three = (list(own.chain(given, noise, STEPS, GUIDANCE)) for given in (conditions[:2], conditions))
    assert [len(step.noise_preds) for step in two + three] == [2] * len(two) + [3] * len(three)
    unconditional, prompts = (condition.states for condition in conditions[:2])
    latents = sample_latents(own.unet, own.scheduler, prompts, unconditional, noise, STEPS, GUIDANCE)
    assert torch.equal(two[-1].latents, latents)
    assert_close(three[-1].latents, latents, rtol=0, atol=1e-4 * float(latents.abs().max()))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_state_is_that_of_the_whole_chain_at_the_cost_of_the_steps_before_it(
    scheduler: str, components: StableDiffusion
) -> None:
    own = with_scheduler(scheduler, components)
    conditions, noise = inputs(own)
    chains = sample_chains(own, conditions[:2], noise, STEPS, GUIDANCE)
    timesteps = own.noise.timesteps(STEPS)
    for stop in (0, 2, len(timesteps) - 1):
        with count_forwards(own.unet) as forwards:
            state, timestep = sample_state(own, conditions[:2], noise, STEPS, GUIDANCE, stop)
        assert torch.equal(state, chains[:, stop, 0])
        assert timestep == timesteps[stop]
        assert forwards.count == stop * 2 * 2
    assert len({float(x) for x in chains[0, :, 0, 0, 0, 0]}) == len(timesteps)


def test_chains_ask_for_no_gradient(components: StableDiffusion) -> None:
    components.unet.requires_grad_(True)
    conditions, noise = inputs(components)
    with count_forwards(components.unet) as forwards:
        chains = sample_chains(components, conditions, noise, STEPS, GUIDANCE)
    assert not chains.requires_grad
    assert (forwards.count, forwards.backward) == (3 * 2 * STEPS, 0)
    assert torch.is_grad_enabled()


def test_velocities_of_a_chain_make_the_same_target_as_noises(tiny_sd2: Any) -> None:
    components = load_copy(str(tiny_sd2))
    process = components.noise
    assert components.scheduler.config.prediction_type == "v_prediction"
    conditions, noise = inputs(components)
    chains = sample_chains(components, conditions, noise, STEPS, GUIDANCE).double()
    for number, timestep in enumerate(process.timesteps(STEPS).long()):
        noisy, uncond, concept, erase_from = chains[:, number].unbind(1)
        t = timestep.expand(2)
        target, *noises = (
            process.noise_of(output, noisy, t)
            for output in (esd_target(erase_from, concept, uncond, 2.0), erase_from, concept, uncond)
        )
        # alpha and sigma are float32 numbers, their squares sum to 1 all the same
        assert_close(target, esd_target(*noises, 2.0), rtol=0, atol=1e-12)
        assert (target - esd_target(erase_from, concept, uncond, 2.0)).abs().max() > 1e-2


def test_ddim_is_that_of_stable_diffusions_first_code(components: StableDiffusion) -> None:
    ddim = components.with_sampler("ddim")
    scheduler = ddim.scheduler
    # 50 steps of DDIM there: 981, 961, ..., 1.
    assert ddim.noise.timesteps(50).tolist() == list(range(981, 0, -20))
    assert scheduler.config.prediction_type == components.scheduler.config.prediction_type
    assert_close(scheduler.alphas_cumprod, components.scheduler.alphas_cumprod)
    # Large predictions of x_0 are left as they are.
    x = torch.full((1, 4, 8, 8), 9.0)
    scheduler.set_timesteps(50)
    assert scheduler.step(torch.zeros_like(x), 1, x).pred_original_sample.min() > 8
    assert components.with_sampler("model").scheduler is components.scheduler
    # The other parts are the same ones.
    assert all(ddim.parts[name] is part for name, part in components.parts.items())


# --- the order of use


@pytest.mark.parametrize("passes", [1, 3])
def test_every_state_of_a_refresh_is_used_as_often_as_said(passes: int) -> None:
    schedule = ReuseSchedule(chains=3, states=5, passes=passes, seed=0)
    assert schedule.uses == 15 * passes
    used = Counter(schedule.place(number) for number in range(2 * schedule.uses))
    assert used == {Place(r, c, s): passes for r in range(2) for c in range(3) for s in range(5)}
    # One pass after the other.
    for first in range(0, 2 * schedule.uses, 15):
        assert len({schedule.place(number) for number in range(first, first + 15)}) == 15


def test_orders_are_shuffled_and_belong_to_seed_and_refresh() -> None:
    def orders(seed: int) -> list[list[tuple[int, int]]]:
        schedule = ReuseSchedule(chains=4, states=10, passes=2, seed=seed)
        order = [tuple(schedule.place(number)[1:]) for number in range(4 * 40)]
        return [order[first : first + 40] for first in range(0, 160, 40)]

    first = orders(0)
    assert orders(0) == first
    assert sorted(first[0]) == [(c, s) for c in range(4) for s in range(10)]
    assert len({tuple(order) for order in (*first, *orders(1))}) == 8
    assert sorted(first[0]) not in first


def test_a_batch_may_lie_across_refreshes() -> None:
    schedule = ReuseSchedule(chains=2, states=3, passes=1, seed=0)
    assert [list(schedule.refreshes(first, 4)) for first in (0, 2, 3, 8)] == [[0], [0], [0, 1], [1]]
    assert list(schedule.refreshes(5, 14)) == [0, 1, 2, 3]
    for first in range(20):
        places = {schedule.place(number).refresh for number in range(first, first + 4)}
        assert set(schedule.refreshes(first, 4)) == places
