from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from helpers import Interrupted, changed, frozen, hook, interrupt, started, weights
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods.esd import ESD, States

Build = Callable[..., ESD]
Fit = Callable[..., L.Trainer]

EDITED = {"states_from": "edited", "states_per_chain": "one"}
POLICIES: dict[str, dict[str, Any]] = {"all": {}, "one": {"states_per_chain": "one"}, "edited": EDITED}
"""Where states come from: whole chains of the frozen model, single states of it, single states of the edited model."""


@pytest.fixture
def build(tiny_sd: Path, pets: str) -> Build:
    """Makes an ``ESD`` that erases the dog from ``tiny_sd``; takes the arguments that shall differ."""

    def make(**arguments: Any) -> ESD:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "num_chain_steps": 2,
            "chains": 2,
            "optimizer": partial(torch.optim.Adam, lr=1e-3),
        }
        return ESD(**{**defaults, **arguments})

    return make


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Fits it in batches of one, and returns the trainer."""
    return partial(fit, batch_size=1)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@torch.no_grad()
def disturb(module: ESD) -> None:
    """An edit as training may have left it."""
    generator = torch.Generator().manual_seed(0)
    for name in module.edited_names:
        parameter = module.pipeline.named_parameters()[name]
        parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)


def record_states(module: ESD) -> list[States]:
    seen: list[States] = []
    for name in ("kept_states", "sampled_states"):
        take = getattr(module, name)
        setattr(module, name, lambda *args, take=take: seen.append(take(*args)) or seen[-1])
    return seen


# --- the loss


@pytest.mark.parametrize(
    "arguments",
    [{}, {"eta": 2.0, "eta_form": "code"}, {"eta": 2.0, "eta_form": "code", "erase_from": "a cat"}],
    ids=["paper", "code", "erase_from"],
)
@pytest.mark.parametrize(
    ("policy", "model"), [("all", "tiny_sd"), ("all", "tiny_sd2"), ("one", "tiny_sd2"), ("edited", "tiny_sd")]
)
def test_the_gradient_is_that_of_two_unets(
    policy: str, arguments: dict[str, Any], model: str, build: Build, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = started(build(model=str(request.getfixturevalue(model)), **POLICIES[policy], **arguments), fit)
    frozen = copy.deepcopy(module.unet).requires_grad_(False)
    disturb(module)
    student = copy.deepcopy(module.unet)
    seen = record_states(module)
    loss = module.training_step(torch.tensor([0]), 0)
    loss.backward()
    # As in a script with two models, one prediction after the other, from x_t on.
    x, t = seen[0].model_input, seen[0].timesteps
    tokenizer, text_encoder = module.pipeline.tokenizer, module.text_encoder
    empty, dog, cat = (encode_prompts(tokenizer, text_encoder, [p]).detach() for p in ("", "dog", "a cat"))
    e_0, e_c, e_cat = (frozen(x, t, state).sample for state in (empty, dog, cat))
    eta = arguments.get("eta", 1.0)
    start = e_cat if "erase_from" in arguments else e_c if eta == 2.0 else e_0
    expected = (student(x, t, cat if "erase_from" in arguments else dog).sample - (start - eta * (e_c - e_0))) ** 2
    expected.mean().backward()
    assert_close(loss, expected.mean(), rtol=1e-4, atol=0)
    ours, theirs = gradients(module.unet), gradients(student)
    assert {f"unet.{name}" for name in ours} == set(module.edited_names) == {f"unet.{name}" for name in theirs}
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        # Float32 predictions in batches of other sizes.
        assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * largest)
    assert largest > 1e-4


def test_states_come_from_the_weights_that_are_said(build: Build, fit: Fit) -> None:
    same = {}
    for policy, arguments in POLICIES.items():
        found = []
        for edited in (False, True):
            module = started(build(**arguments), fit, batch_size=5)
            if edited:
                disturb(module)
            take = module.kept_states if policy == "all" else module.sampled_states
            found.append(take(torch.arange(5), 0))
        before, after = found
        assert torch.equal(before.timesteps, after.timesteps)
        # A chain starts at the same noise whoever denoises it; the second state is the model's work.
        later = before.timesteps < before.timesteps.max()
        assert 0 < int(later.sum()) < 5
        assert torch.equal(before.model_input[~later], after.model_input[~later])
        same[policy] = torch.equal(before.model_input[later], after.model_input[later])
        # The target is the frozen model's, whatever the weights are.
        assert all(
            torch.equal(a[~later], b[~later]) for a, b in zip(before.noise_preds, after.noise_preds, strict=True)
        )
    assert same == {"all": True, "one": True, "edited": False}


@pytest.mark.parametrize("policy", ["all", "edited"])
def test_the_reference_stays_that_of_a_copy_while_weights_move(policy: str, build: Build, fit: Fit) -> None:
    module = build(**POLICIES[policy])
    module.configure_model()
    before = copy.deepcopy(module.unet)
    fit(module, steps=4)
    assert changed(dict(before.named_parameters()), dict(module.unet.named_parameters()))
    states, t = module.conditions(torch.tensor([0]))[1].states, torch.tensor([400])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = before(x, t, states).sample
        assert torch.equal(frozen(module, x, t, states), expected)
        assert not torch.equal(module.unet(x, t, states).sample, expected)


@pytest.mark.parametrize("group", ["xattn", "xattn-kv", "noxattn", "selfattn", "full"])
def test_the_weights_of_the_group_move_and_no_others(group: str, build: Build, fit: Fit) -> None:
    module = build(edited_parameters=group)
    module.configure_model()
    before = weights(module)
    fit(module)
    moved = changed(before, weights(module))
    assert set(moved) <= set(module.edited_names)
    # All of them learn, but for biases that the next normalisation takes out again or that attention cancels.
    assert len(moved) > 0.9 * len(module.edited_names) > 0


def test_it_descends(build: Build, fit: Fit) -> None:
    losses: list[float] = []
    record = hook("on_train_batch_end", lambda trainer, module, outputs, *_: losses.append(float(outputs["loss"])))
    # One refresh of four states, used again and again.
    fit(build(passes=100), record, steps=15, batch_size=4)
    assert losses[-1] < 0.5 * losses[0]


def test_mixed_precision_trains_the_edited_weights_against_the_frozen_ones(build: Build, fit: Fit) -> None:
    for policy in ("all", "edited"):
        module = build(**POLICIES[policy])
        fit(module, precision="bf16-mixed")
        assert module.pretrained.change_ratio() > 1e-4
        assert module.unet.dtype == torch.float32
    # The edited weights make the student's prediction, not casts of the frozen ones that the chains left behind.
    module = started(build(), fit)
    with torch.autocast("cpu", torch.bfloat16):
        unedited = float(module.training_step(torch.tensor([0]), 0).detach())
    disturb(module)
    module.refresh = -1
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(float(module.training_step(torch.tensor([0]), 0).detach()) - unedited) > 1e-3 * unedited


# --- what it costs


@pytest.mark.parametrize(
    ("arguments", "steps", "forwards"),
    [
        ({}, 8, 2 * 8 + 8),  # 2 chains of 2 states are 4 steps' worth, at 2 forwards a state
        ({"passes": 2}, 8, 2 * 4 + 8),
        ({"erase_from": "a cat", "eta_form": "code"}, 8, 3 * 8 + 8),
        ({"states_per_chain": "one"}, 8, None),
        ({**EDITED}, 8, None),
    ],
    ids=["all", "two passes", "erase_from", "one", "edited"],
)
def test_forwards_and_backwards_of_a_step(
    arguments: dict[str, Any], steps: int, forwards: int | None, build: Build, fit: Fit
) -> None:
    module = build(**arguments)
    seen = record_states(module)
    fit(module, steps=steps)
    if forwards is None:
        stops = [module.timesteps.tolist().index(int(states.timesteps[0])) for states in seen]
        assert set(stops) == {0, 1}
        # Two of each step up to the stop, two of the frozen model there, and the student's.
        forwards = sum(2 * stop + 2 + 1 for stop in stops)
    assert (module.forwards.count, module.forwards.backward) == (forwards, steps)
    per_step = (module.forwards.count + 2 * module.forwards.backward) / steps
    assert module.report["unet_forward_equivalents_per_step"] == per_step
    if arguments.get("states_per_chain") != "one":
        assert per_step <= 6


# --- which states, when


def test_slots_take_states_in_the_order_of_the_schedule(build: Build, fit: Fit) -> None:
    module = build(chains=3, num_chain_steps=2)
    seen = record_states(module)
    kept: dict[int, Tensor] = {}
    record = hook("on_train_batch_end", lambda trainer, module, *_: kept.setdefault(module.refresh, module.kept))
    fit(module, record, steps=3, batch_size=4)  # two refreshes of six states, the second batch across them
    assert set(kept) == {0, 1}
    for step, states in enumerate(seen):
        for slot in range(4):
            refresh, chain, state = module.schedule.place(4 * step + slot)
            row = kept[refresh][chain, state]
            assert torch.equal(states.model_input[slot], row[0])
            assert torch.equal(torch.stack(states.noise_preds)[:, slot], row[1:])
            assert states.timesteps[slot] == module.timesteps[state]
            assert states.prompts[slot] == (3 * refresh + chain) % module.num_pairs
    inputs = torch.cat([states.model_input for states in seen])
    assert len({float(x) for x in inputs[:, 0, 0, 0]}) == 12


@pytest.mark.parametrize("policy", ["all", "one"])
def test_two_processes_take_the_states_of_one(policy: str, build: Build, fit: Fit) -> None:
    module = started(build(concept=["dog", "cat"], **POLICIES[policy]), fit, batch_size=4)
    module.trainer.fit_loop.max_batches = 2
    take = module.kept_states if policy == "all" else module.sampled_states
    module.global_batch_size = 4
    batch = torch.tensor([0, 3, 4, 7])  # slots 0 to 3
    for step in range(2):
        whole = take(batch, step)
        for rank in range(2):
            share = take(batch[rank::2], step)
            assert torch.equal(share.timesteps, whole.timesteps[rank::2])
            assert torch.equal(share.prompts, whole.prompts[rank::2])
            # Rounding of batches of other sizes.
            assert_close(share.model_input, whole.model_input[rank::2], rtol=1e-4, atol=1e-4)
    if policy != "all":
        assert whole.prompts.tolist() == [0, 1, 0, 1]


def test_chains_depend_on_seed_and_refresh_alone(build: Build, fit: Fit) -> None:
    module = started(build(), fit)
    state = torch.get_rng_state()
    chains = {}
    for refresh in (0, 1, 0):
        module.make_chains(refresh)
        assert refresh not in chains or torch.equal(chains[refresh], module.kept)
        chains[refresh] = module.kept
    assert torch.equal(torch.get_rng_state(), state)
    other = started(build(seed=1), fit)
    other.make_chains(0)
    starts = torch.cat([chains[0][:, 0, 0], chains[1][:, 0, 0], other.kept[:, 0, 0]])
    assert len({float(x) for x in starts[:, 0, 0, 0]}) == 6


def test_prompts_of_several_concepts_take_turns(build: Build, fit: Fit) -> None:
    both = ["dog", "cat"]
    assert build(concept=both).prompts == ["dog", "cat"]
    module = build(concept=both, prompts="edit_prompts", chains=3)
    assert module.prompts == ["a dog", "a cat", "the dog at sunset", "the cat in the rain"]
    assert [module.prompt_of(refresh, chain) for refresh in range(3) for chain in range(3)] == [0, 1, 2, 3] * 2 + [0]
    rain = ESD(concept=["rain", "dog"])  # of emoji20, whose rain has three names
    assert load_concept_set("emoji20").get("rain").names == ("rain", "rainy", "raining")
    assert rain.prompts == ["rain", "dog", "rainy", "dog", "raining", "dog"]


@pytest.mark.parametrize("policy", ["all", "one"])
def test_several_concepts_are_erased_in_one_run(policy: str, build: Build, fit: Fit) -> None:
    module = build(concept=["dog", "cat"], **POLICIES[policy])
    seen = record_states(module)
    fit(module, steps=4, batch_size=2)
    prompts = torch.cat([states.prompts for states in seen]).tolist()
    assert sorted(prompts) == [0] * 4 + [1] * 4
    # The predictions are those for the state's own prompt.
    for states in seen:
        own = module.conditions(states.prompts)[1].states
        expected = frozen(module, states.model_input, states.timesteps, own)
        assert_close(states.noise_preds[1], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        others = module.conditions(1 - states.prompts)[1].states
        other = frozen(module, states.model_input, states.timesteps, others)
        assert (states.noise_preds[1] - other).abs().max() > 1e-2 * float(expected.abs().max())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("policy", ["all", "edited"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    policy: str, build: Build, fit: Fit, tmp_path: Path
) -> None:
    # Three chains of two states, in batches of two: the run stops within a refresh and within the second epoch.
    make = partial(build, chains=3, **POLICIES[policy])
    options: dict[str, Any] = {"steps": 3, "batch_size": 2, "max_epochs": 2}
    whole, first, resumed = make(), make(), make()
    fit(whole, **options)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=1)
    with pytest.raises(Interrupted):
        fit(first, keep(), interrupt("on_train_batch_end", step=5), **options)
    assert torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == 4
    trainer = fit(resumed, keep(), ckpt_path=tmp_path / "saved/last.ckpt", **options)
    assert trainer.global_step == 6
    assert changed(weights(whole), weights(first)) != []
    assert changed(weights(whole), weights(resumed)) == []


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"eta": 0.0}, r"model\.eta=0\.0 does not guide away from the concept: give a positive number"),
        ({"eta": -1.0}, r"model\.eta=-1\.0"),
        ({"start_guidance": -0.5}, r"model\.start_guidance=-0\.5 must not be negative: the paper uses 3"),
        ({"chains": 0}, r"model\.chains=0 must be at least 1"),
        ({"passes": 0}, r"model\.passes=0 must be at least 1"),
        ({"num_chain_steps": 0}, r"model\.num_chain_steps=0 must be at least 1"),
        ({"states_from": "edited"}, r"model\.states_from='edited' .* set model\.states_per_chain=one"),
        ({"erase_from": "a cat"}, r"model\.erase_from='a cat' .* set model\.eta_form=code"),
        ({"edited_parameters": "attn3"}, "edited_parameters='attn3' selects no parameter"),
        ({"edited_parameters": "text-fc2"}, "edited_parameters='text-fc2' selects text_encoder.* only weights of"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    arguments: dict[str, Any], problem: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        build(**arguments)


# --- samplers that draw noise


@pytest.mark.parametrize("policy", POLICIES)
def test_chains_of_a_sampler_that_draws_noise_have_their_own(
    policy: str, build: Build, fit: Fit, broken_model: Callable[..., Path]
) -> None:
    def draw_noise(folder: Path) -> None:
        path = folder / "scheduler/scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "_class_name": "EulerAncestralDiscreteScheduler"}), encoding="utf-8")

    model, state, found = str(broken_model(draw_noise)), torch.get_rng_state(), []
    for _ in range(2):
        module = started(build(model=model, num_chain_steps=4, **POLICIES[policy]), fit)
        torch.manual_seed(len(found))  # of the process: it must not matter
        found.append(record_states(module))
        for number in range(3):
            module.training_step(torch.tensor([0]), number)
    torch.set_rng_state(state)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.model_input, second.model_input)
    assert not torch.equal(found[0][0].model_input, found[0][1].model_input)


@pytest.mark.parametrize(("field", "kind"), [("num_chain_steps", "LCM"), ("num_inference_steps", "PNDM")])
def test_steps_that_the_sampler_cannot_take_are_refused_before_it_is_loaded(
    field: str, kind: str, build: Build, broken_model: Callable[..., Path]
) -> None:
    def change(folder: Path) -> None:
        path = folder / "scheduler/scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "_class_name": f"{kind}Scheduler"}), encoding="utf-8")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["scheduler"] = ["diffusers", f"{kind}Scheduler"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    model, bad = str(broken_model(change)), {"LCM": 51, "PNDM": 3}[kind]
    with pytest.raises(ValueError, match=rf"^model\.{field}={bad} cannot be used with the model's {kind}Scheduler"):
        build(model=model, **{"num_chain_steps": 20, field: bad})
    build(model=model, **{"num_chain_steps": 20, "num_inference_steps": 20, field: 20})
    if field == "num_chain_steps":
        build(model=model, chain_sampler="ddim", num_chain_steps=bad)
