from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from helpers import LAYERS, PROMPTS, TARGETS, by_null_space, changed, hook, sample_latents, started, weights
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.diffusion.hooks import replace_output
from lit_unlearn.diffusion.prompts import encode_prompts, tokenize
from lit_unlearn.diffusion.sampling import add_noise, initial_noise
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]

ALIGNMENT = [[0, 1, 3, *range(4, 32), 31]] * 2
"""Target position of each edit position: "dog" takes "ball", the last token of its target, and all behind it shifts."""


def null_space_edit() -> ClosedFormEdit:
    """The exact null space, and a ridge that is small for the small keys of the tiny model."""
    return by_null_space(threshold=1e-8, rule="max", ridge=1e-3)


class SameNoise(ValueRefinement):
    """Compares on the same noise in every step, so that the loss is a function of V1 alone."""

    def noise(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().noise(batch % self.num_pairs, 0)


# --- the values


def test_values_start_as_the_layers_output(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(first_layer=2), fit)
    assert module.state is not None
    block = module.text_encoder.encoder.layers[2]
    assert torch.equal(module.values, module.state.keys @ block.mlp.fc2.weight.mT)
    # With these values in its place the layer says what it says anyway: the loss is that of the unedited prompts.
    batch = torch.tensor([0, 1])
    latents, noise, timesteps = module.noise(batch, 0)
    noisy = add_noise(module.pipeline.scheduler, latents, noise, timesteps)
    states = [encode_prompts(module.pipeline.tokenizer, module.text_encoder, p) for p in (PROMPTS, TARGETS)]
    prediction, goal = (module.unet(noisy, timesteps, state).sample for state in states)
    # Float32 noise predictions, in two ways to add the bias.
    assert_close(module.training_step(batch, 0), (prediction - goal).square().mean(), rtol=1e-4, atol=0)


def test_refinement_lowers_the_error(refinement: Refinement, fit: Fit) -> None:
    losses: list[float] = []
    record = hook("on_train_batch_end", lambda trainer, module, outputs, *_: losses.append(float(outputs["loss"])))
    fit(refinement(SameNoise, first_layer=2), record, steps=20)
    assert len(losses) == 20
    # Every step compares on the same noise, so nothing but V1 can lower the error.
    assert losses[-1] < 0.3 * losses[0]


def test_the_pull_keeps_values_near_their_start(refinement: Refinement, fit: Fit) -> None:
    def distance(pull: float) -> float:
        module = refinement(SameNoise, first_layer=2, pull=pull)
        fit(module, steps=8)
        assert module.state is not None
        return float((module.values - module.state.initial).detach().norm())

    assert distance(1e3) < 0.5 * distance(0.0)


def test_only_values_learn_and_only_the_layer_of_the_epoch_moves_at_its_end(refinement: Refinement, fit: Fit) -> None:
    module = refinement(rounds=2)
    seen: list[dict[str, Tensor]] = []
    moved: list[list[str]] = []

    def at_start(trainer: L.Trainer, module: ValueRefinement) -> None:
        now = weights(module)
        if seen:
            moved.append(changed(seen[-1], now))
        seen.append(now)

    def unmoved(trainer: L.Trainer, module: ValueRefinement, *_: Any) -> None:
        assert changed(seen[-1], weights(module)) == []

    def gradients(trainer: L.Trainer, module: ValueRefinement) -> None:
        assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["values"]
        assert module.values.grad is not None
        assert module.values.grad.abs().max() > 0

    trainer = fit(
        module,
        hook("on_train_epoch_start", at_start),
        hook("on_after_backward", gradients),
        hook("on_train_batch_end", unmoved),
        hook("on_train_epoch_end", unmoved),
        null_space_edit(),
        hook("on_train_end", at_start),
    )
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["values"]
    assert moved == [[LAYERS[0]], [LAYERS[1]], [LAYERS[0]], [LAYERS[1]]]
    assert (trainer.current_epoch, trainer.global_step) == (4, 8)


def test_without_a_closed_form_nothing_is_edited(refinement: Refinement, fit: Fit) -> None:
    module = refinement()
    fit(module)
    assert module.pretrained.change_ratio() == 0


def test_each_layer_starts_with_a_fresh_optimizer(refinement: Refinement, fit: Fit) -> None:
    steps: list[int] = []

    def count(trainer: L.Trainer, module: ValueRefinement, *_: Any) -> None:
        steps.append(int(trainer.optimizers[0].state[module.values]["step"]))

    fit(refinement(), hook("on_train_batch_end", count), steps=3)
    assert steps == [1, 2, 3, 1, 2, 3]


def test_later_layers_see_what_earlier_edits_did(refinement: Refinement, fit: Fit) -> None:
    keys: dict[str, Tensor] = {}

    def record(trainer: L.Trainer, module: ValueRefinement, *_: Any) -> None:
        assert module.state is not None
        keys[module.state.name] = module.state.keys

    module = refinement()
    fit(module, hook("on_train_batch_end", record), null_space_edit())
    with module.pretrained.restored():
        before = {name: module.paired.keys(name, module.paired.first.edit_ids) for name in LAYERS}
    assert torch.equal(keys[LAYERS[0]], before[LAYERS[0]])
    assert (keys[LAYERS[1]] - before[LAYERS[1]]).norm() > 1e-3 * before[LAYERS[1]].norm()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [range(32), range(32)]),
        ("no_bos", [range(1, 32), range(1, 32)]),
        ("content", [range(1, 3), range(1, 5)]),
        ("eot", [range(3, 32), range(5, 32)]),
    ],
)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_only_the_positions_asked_for_are_replaced(
    positions: str,
    expected: list[range],
    model: str,
    refinement: Refinement,
    fit: Fit,
    request: pytest.FixtureRequest,
) -> None:
    # "a dog" has two tokens between BOS and EOS, "the dog at sunset" four, whatever the padding is.
    module = started(refinement(positions=positions, model=str(request.getfixturevalue(model))), fit)
    edited = module.paired.first.mask
    assert [mask.nonzero().flatten().tolist() for mask in edited] == [list(places) for places in expected]
    module.training_step(torch.tensor([0, 1]), 0).backward()
    assert module.values.grad is not None
    assert not module.values.grad[~edited].any()


# --- values taken from the target


def test_direct_values_follow_the_papers_formula(refinement: Refinement, fit: Fit) -> None:
    module = refinement(values="target", first_layer=1, last_layer=1)
    module.configure_model()
    layer, text_encoder = module.text_encoder.encoder.layers[1].mlp.fc2, module.text_encoder
    inputs: list[Tensor] = []
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
        for prompts in (PROMPTS, TARGETS, module.retain_prompts):
            text_encoder(tokenize(module.pipeline.tokenizer, prompts))
        handle.remove()
    edit, target, retain = inputs
    aligned = torch.stack([rows[ALIGNMENT[i]] for i, rows in enumerate(target)])
    weight = layer.weight.detach().double().clone()
    # From here on as in the paper: columns are tokens.
    K0, K1 = retain.flatten(0, 1).mT, edit.flatten(0, 1).mT
    V1 = weight @ aligned.flatten(0, 1).mT
    left, singular_values, _ = torch.linalg.svd(K0, full_matrices=True)
    rank = int((singular_values > 1e-6 * singular_values[0]).sum())
    U = left[:, rank:]
    P = U @ U.mT
    ridge = 1e-3
    delta = (V1 - weight @ K1) @ K1.mT @ P @ torch.linalg.inv(K1 @ K1.mT @ P + ridge * torch.eye(128).double())

    fit(module, by_null_space(threshold=1e-8, rule="max", ridge=ridge), steps=1)
    found = layer.weight.detach().double() - weight
    # Keys and weight are float32 and the system's condition is about 1e5, so three digits are what can be asked for.
    assert (found - delta).norm() < 1e-3 * delta.norm()
    assert delta.norm() > 1e-2 * weight.norm()


def test_the_residual_of_the_last_layer_makes_up_for_all_that_is_missing(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(values="residual", first_layer=2), fit)
    assert module.state is not None
    with torch.no_grad(), replace_output(module.state.layer, module.values, module.paired.first.mask):
        states = encode_prompts(module.pipeline.tokenizer, module.text_encoder, PROMPTS)
    goals = encode_prompts(module.pipeline.tokenizer, module.text_encoder, TARGETS)
    aligned = torch.stack([goal[ALIGNMENT[i]] for i, goal in enumerate(goals)])
    # Sums and differences of float32 numbers of order 10, then a layer norm.
    assert_close(states, aligned, rtol=0, atol=1e-4)


def test_the_residual_is_shared_among_the_layers(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(start="residual", first_layer=0), fit)
    assert module.state is not None
    pairs = module.paired.first
    last = module.text_encoder(pairs.edit_ids, output_hidden_states=True).hidden_states[-1]
    goal = module.text_encoder(pairs.target_ids, output_hidden_states=True).hidden_states[-1]
    aligned = torch.stack([rows[ALIGNMENT[i]] for i, rows in enumerate(goal)])
    # Three layers are to be edited, so the first one takes a third.
    assert_close(module.values.detach(), module.state.initial + (aligned - last).detach() / 3, rtol=0, atol=1e-4)


def test_a_descent_may_start_at_the_target(refinement: Refinement, fit: Fit) -> None:
    descending, direct = (
        started(refinement(**arguments), fit) for arguments in ({"start": "target"}, {"values": "target"})
    )
    assert torch.equal(descending.values, direct.values)
    assert not torch.equal(descending.values, started(refinement(), fit).values)
    fit(descending)
    assert descending.forwards.count > 0


def test_direct_values_are_not_trained(refinement: Refinement, fit: Fit) -> None:
    values: list[Tensor] = []
    record = hook("on_train_batch_start", lambda trainer, module, *_: values.append(module.values.detach().clone()))
    module = refinement(values="target", last_layer=1)
    fit(module, record, steps=3)
    assert torch.equal(values[0], values[2])
    assert module.forwards.count == 0


def test_pairs_of_names_are_the_authors(refinement: Refinement, fit: Fit) -> None:
    module = refinement(pairs="names")
    assert (module.edit_prompts, module.target_prompts) == (["dog"], ["soccer ball"])
    module = started(module, fit, batch_size=3)
    assert module.values.shape == (1, 32, 32)
    # A batch repeats the only pair, each time with other noise.
    latents, noise, _ = module.noise(torch.arange(3), 0)
    assert torch.equal(latents[0], latents[1])
    assert (noise[0] - noise[1]).abs().max() > 0.1


# --- what the frozen model provides


def test_pictures_and_goals_are_the_pretrained_models_even_after_an_edit(refinement: Refinement, fit: Fit) -> None:
    module = refinement(latents_per_prompt=2, seed=5)
    module.configure_model()
    tokenizer, unet, text_encoder = module.pipeline.tokenizer, module.unet, module.text_encoder
    states, goals, empty = (encode_prompts(tokenizer, text_encoder, p) for p in (PROMPTS, TARGETS, [""]))
    seeds = [[5, 6], [100_005, 100_006]]
    expected = [
        sample_latents(unet, module.pipeline.scheduler, states, empty, initial_noise(unet, s), 1, 4.0) for s in seeds
    ]
    with torch.no_grad():
        module.text_encoder.encoder.layers[1].mlp.fc2.weight.mul_(-1)  # as a resumed run finds it
    started(module, fit)
    assert torch.equal(module.latents, torch.stack(expected))
    assert torch.equal(module.goal.states, goals)
    assert not module.latents.is_inference()


def test_two_processes_descend_the_loss_of_one(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(positions="no_bos"), fit)

    def gradient(batch: list[int]) -> Tensor:
        module.values.grad = None
        module.training_step(torch.tensor(batch), 1).backward()
        assert module.values.grad is not None
        return module.values.grad

    whole = gradient([0, 1])
    # DDP averages the gradients of equal shares; float32 rounding of other batch sizes remains.
    assert_close((gradient([0]) + gradient([1])) / 2, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_noise_is_added_as_in_training(refinement: Refinement) -> None:
    module = refinement()
    module.configure_model()
    latents, noise, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(
        add_noise(module.pipeline.scheduler, latents, noise, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
    )


def test_keys_carry_the_concept_from_its_first_token_on(refinement: Refinement, fit: Fit) -> None:
    module = started(refinement(positions="no_bos", start="target", values="target"), fit)
    module.on_train_epoch_start()
    # "a dog" and "the dog at sunset" differ from their targets at the third token; the text is 32 tokens long.
    ((write,),) = module.writes(0)
    assert write.concept_keys is not None
    assert write.concept_keys.tolist() == ([False] + [True] * 30) * 2
    weight = module.layers[write.name].weight.detach()
    outputs = write.keys @ weight.mT
    moved = (write.values - outputs).norm(dim=1) > 1e-3 * outputs.norm(dim=1)
    assert not moved[~write.concept_keys].any() and moved[write.concept_keys].all()


def test_the_cost_is_what_the_unet_did(refinement: Refinement, fit: Fit) -> None:
    module = refinement(rounds=2)
    fit(module, null_space_edit(), steps=3)
    # Latents of 2 prompts with guidance, one step; then 2 rounds of 2 layers of 3 steps of 2 prompts, and the goals of
    # each round.
    assert module.current_cost()["unet_forwards"] == 2 * 2 + (2 * 2 * 3) * 2 + (2 * 3) * 2


# --- other models


def test_a_model_with_the_names_of_2022_is_edited_alike(tiny_sd_2022: Path, refinement: Refinement, fit: Fit) -> None:
    modules = [refinement(), refinement(model=str(tiny_sd_2022))]
    for module in modules:
        fit(module, null_space_edit())
    assert modules[0].edited_names == modules[1].edited_names == LAYERS
    assert changed(weights(modules[0]), weights(modules[1])) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_velocity_prediction_and_half_precision(dtype: str, tiny_sd2: Path, refinement: Refinement, fit: Fit) -> None:
    module = refinement(model=str(tiny_sd2), dtype=dtype)
    fit(module, null_space_edit())
    edited = weights(module)
    assert {value.dtype for value in edited.values()} == {getattr(torch, dtype)}
    assert all(value.isfinite().all() for value in edited.values())
    assert (
        sorted(changed(edited, module.pretrained.values | {n: v for n, v in edited.items() if n not in LAYERS}))
        == LAYERS
    )
