"""Pictures and noise of a descent depend only on the seed and their own numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor

from helpers import PROMPTS, started
from lit_unlearn.methods.shared import noised
from lit_unlearn.methods.shared.noised import RoundGoals, drawn, noise_of_items
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]


def test_noise_belongs_to_seed_round_step_and_item(
    refinement: Refinement, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = started(refinement(rounds=2, min_timestep=300, max_timestep=700, latents_per_prompt=3), fit)
    noise_of = partial(noise_of_items, module, module.latents)
    state = torch.get_rng_state()
    batch = torch.arange(8)
    together = noise_of(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [torch.cat(parts) for parts in zip(*(noise_of(item[None], 3) for item in batch), strict=True)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    latents, noise, timesteps = together
    assert len({float(x) for x in noise[:, 0, 0, 0]}) == 8
    assert not torch.equal(noise_of(batch, 4)[1], noise)
    for epoch, same in ((0, True), (1, True), (2, False), (3, False)):  # two layers a round
        monkeypatch.setattr(ValueRefinement, "current_epoch", epoch)
        assert torch.equal(noise_of(batch, 3)[1], noise) is same, epoch
    monkeypatch.undo()
    for item in range(8):
        assert any(torch.equal(latents[item], candidate) for candidate in module.latents[:, item % 2])
    assert timesteps.min() >= 300
    assert timesteps.max() < 700
    assert len(set(timesteps.tolist())) > 1
    module.seed += 1
    assert not torch.equal(noise_of(batch, 3)[1], noise)


def test_goals_are_asked_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    goals, asked = RoundGoals(), list[tuple[int, int]]()

    def of(number: int, step: int) -> Tensor:
        def predict() -> Tensor:
            asked.append((number, step))
            return torch.full((2, 4, 3, 3), 10.0 * number + step)

        return goals.of(number, step, torch.tensor([0, 1]), predict)

    wanted = [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 0), (0, 0)]
    assert [float(of(*place).mean()) for place in wanted] == [10 * number + step for number, step in wanted]
    assert asked == [(0, 0), (0, 1), (1, 0), (0, 0)]
    monkeypatch.setattr(RoundGoals, "MOST_BYTES", 2 * 4 * 9 * 4)  # one step's
    asked.clear()
    for _ in range(2):  # two layers
        for step in range(3):
            of(2, step)
    assert asked == [(2, 0), (2, 1), (2, 2), (2, 1), (2, 2)]
    goals.of(2, 0, torch.tensor([1]), lambda: torch.zeros(1))
    assert (goals.of(2, 0, torch.tensor([0, 1]), lambda: torch.zeros(1)) == 20).all()  # others of the same step
    monkeypatch.undo()
    part = goals.of(3, 0, torch.tensor([0]), lambda: torch.zeros(1, 8, 3, 3)[:, :4])
    assert goals.of(3, 0, torch.tensor([0]), lambda: part).untyped_storage().nbytes() == part.nbytes
    monkeypatch.setattr(RoundGoals, "MOST_BYTES", 2 * 4 * 9 * 4)
    assert RoundGoals.kept(3, 2 * 4 * 9 * 4) == 1 and RoundGoals.kept(1, 1) == 1


@pytest.mark.parametrize(("first_layer", "kept"), [(1, 1), (-1, 0)])  # two layers, and one, which asks once anyway
def test_goals_are_kept_where_another_layer_asks_for_them(
    first_layer: int, kept: int, refinement: Refinement, fit: Fit
) -> None:
    module = started(refinement(first_layer=first_layer), fit)
    for _ in range(2):
        module.training_step(torch.tensor([0, 1]), 0)
        assert len(module.round_goals.found) == kept


def test_a_picture_is_that_of_its_own_seed_in_any_batch(
    refinement: Refinement, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = started(refinement(seed=5), fit)
    condition = module.pipeline.encode_many([*PROMPTS, PROMPTS[0]])
    together = drawn(module, condition, 100)
    settings = module.num_inference_steps, module.guidance_scale
    assert torch.equal(together, module.pipeline.draw_latents(condition, [105, 106, 107], *settings))
    monkeypatch.setattr(noised, "UNET_BATCH", 2)
    # Float32, in batches of other sizes.
    torch.testing.assert_close(drawn(module, condition, 100), together, rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1  # the same prompt from another seed
