from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import FF, KV, PROMPTS, TARGETS, by_least_squares, changed, exact, half, hook, started, states, weights
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.sampling import add_noise
from lit_unlearn.methods.shared.noised import noised
from lit_unlearn.methods.value_refinement import ValueRefinement

ALIGNMENT = [0, 1, 3, *range(4, 32), 31]
"""Target position of each edit position: "dog" takes "ball", the last token of its target, and all behind it shifts."""

Build = Callable[..., Any]
Fit = Callable[..., L.Trainer]


@pytest.fixture(scope="session")
def short_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``tiny_sd`` with texts of 8 tokens: two retained prompts and the empty one have fewer keys than K's 32 inputs."""
    folder = tmp_path_factory.mktemp("models") / "short-sd"
    shutil.copytree(tiny_sd, folder)
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "model_max_length": 8}), encoding="utf-8"
    )
    return str(folder)


def test_keys_are_the_text_states_and_v1_starts_at_the_layers_output(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(), fit)
    expected = states(module, *PROMPTS)
    for name in KV:
        state = module.layer_state(name)
        assert torch.equal(state.keys, expected)
        assert torch.equal(state.initial, expected @ module.layers[name].weight.mT)
    assert module.state.name == KV[0]
    assert torch.equal(module.values_of(module.state), module.state.initial)


def test_the_loss_compares_with_the_unedited_unet_at_the_target_prompt(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(), fit)
    batch = torch.tensor([0, 1])
    with torch.no_grad():
        for layer in module.layers.values():  # as if it had been edited
            layer.weight.mul_(1.5)
        edited = weights(module)
        state = module.prepare_layer(0)
        module.values_of(state).copy_(state.initial)
        latents, noise, timesteps = module.noise(batch, 0)
        noisy = add_noise(module.pipeline.scheduler, latents, noise, timesteps)
        prediction = module.unet(noisy, timesteps, states(module, *PROMPTS)).sample
        seen_by_edited = module.unet(noisy, timesteps, states(module, *TARGETS)).sample
        with module.pretrained.restored():
            goal = module.unet(noisy, timesteps, states(module, *TARGETS)).sample
    # Float32 noise predictions of batches of two.
    assert_close(module.training_step(batch, 0), (prediction - goal).square().mean(), rtol=1e-4, atol=0)
    assert (seen_by_edited - goal).abs().max() > 1e-3
    assert changed(weights(module), edited) == []


def test_gradients_reach_v1_alone_and_only_at_its_positions(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(positions="eot"), fit)
    module.training_step(torch.tensor([0, 1]), 0).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["values"]
    mask = module.paired.first.mask
    assert not module.values.grad[~mask].any() and module.values.grad[mask].any()


def test_direct_values_are_those_of_the_target_prompt(keys_and_values: Build, fit: Fit) -> None:
    seen: dict[str, Tensor] = {}
    anchors: list[Tensor] = []

    def keep(trainer: L.Trainer, module: Any, *_: Any) -> None:
        for name in KV:
            write = module.layer_state(name).write(None, module.retained[name], None)
            seen[name] = write.wanted().unflatten(0, (2, 32)).float()
            anchors.append(write.anchors)

    module = keys_and_values(values="target", rounds=2)
    fit(module, hook("on_train_batch_start", keep), half(), steps=1)
    assert len(anchors) == 2 * len(KV)  # an epoch for each round
    aligned = states(module, *TARGETS)[:, ALIGNMENT]
    assert module.pretrained.change_ratio() > 1e-2
    for name in KV:  # of the unedited UNet, in the second round too
        assert_close(seen[name], aligned @ module.pretrained.values[name].mT, rtol=0, atol=1e-5)
    assert all(found is anchors[0] for found in anchors)
    assert module.values.shape == () and module.own_state() == []  # V1 is never held


def test_an_edit_writes_the_targets_keys_and_values(keys_and_values: Build, fit: Fit) -> None:
    module = keys_and_values(values="target", positions="content")
    # Six tokens are independent in 32 dimensions, so with every direction free and hardly a ridge nothing is left over.
    fit(module, by_least_squares(ridge=1e-8, retain_weight=0.0), steps=1)
    mask = module.paired.first.mask
    keys, wanted = states(module, *PROMPTS)[mask], states(module, *TARGETS)[:, ALIGNMENT][mask]
    assert len(keys) == 6
    for name in KV:
        before, after = module.pretrained.values[name], module.layers[name].weight.detach()
        wished = wanted @ before.mT
        # Float32 sums of 32 products.
        assert_close(keys @ after.mT, wished, rtol=0, atol=1e-3)
        assert (keys @ before.mT - wished).abs().max() > 0.1


def test_retained_prompts_keep_their_keys_and_values(keys_and_values: Build, short_sd: str, fit: Fit) -> None:
    def outputs(module: Any) -> list[Tensor]:
        rows = states(module, *module.retain_prompts, "")
        return [rows @ module.layers[name].weight.detach().mT for name in KV]

    def moved(edit: Any, **arguments: Any) -> tuple[float, dict[str, Any]]:
        module = keys_and_values(model=short_sd, rounds=2, **arguments)
        fit(module, edit)
        after = outputs(module)
        with module.pretrained.restored():
            before = outputs(module)
        assert module.report["weight_change_ratio"] > 1e-2
        return max(float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)), module.report

    kept, report = moved(exact())
    # Float32 weights.
    assert kept < 3e-6
    assert report["retained_state_drift"] < 1e-4
    # 24 keys of 32 inputs, BOS shared; the seven EOS of the empty prompt differ by their positions.
    assert {layer["null_space_dimension"] for layer in report["layers"].values()} == {32.0 - (3 * 8 - 2)}
    without, other = moved(by_least_squares(ridge=1e-3, retain_weight=0.0))
    assert without > 1e3 * kept
    assert other["retained_state_drift"] > 100 * report["retained_state_drift"]
    # Unless it is asked for, the empty prompt is not among them.
    assert moved(exact(), retain_empty=False)[0] > 1e3 * kept


def test_the_moment_holds_the_empty_prompt_as_often_as_all_others(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(), fit)
    rows = states(module, *module.retain_prompts).flatten(0, 1).double()
    empty = states(module, "")[0].double()
    for name in KV:
        retained = module.retained[name]
        assert_close(retained.moment, rows.mT @ rows + 2 * empty.mT @ empty, rtol=1e-10, atol=1e-10)
        assert retained.count == 2 * len(rows) == 128
        assert retained.largest_norm == pytest.approx(float(torch.cat([rows, empty]).norm(dim=1).max()), rel=1e-6)


# --- the FFN


def test_keys_are_what_enters_the_layer_at_the_fixed_noises(feed_forward: Build, fit: Fit) -> None:
    module = started(feed_forward(noises_per_prompt=3), fit)
    assert module.num_pairs == 6
    seen: dict[str, list[Tensor]] = {name: [] for name in FF}
    for name, layer in module.layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        module.unet(module.noisy, module.timesteps, states(module, *PROMPTS * 3))
    assert len(set(module.timesteps.tolist())) > 1
    for name, (expected, *_) in list(seen.items()):
        state = module.layer_state(name)
        # Six pictures at once there, and here; float32 convolutions may round otherwise.
        assert_close(state.keys, expected, rtol=0, atol=1e-4)
        assert state.keys.shape == (6, 16, 128)
        assert state.mask.all()


def test_noises_are_of_the_edit_prompts_pictures_and_in_range(feed_forward: Build, fit: Fit) -> None:
    module = started(feed_forward(noises_per_prompt=8, min_timestep=300, max_timestep=400), fit)
    assert module.timesteps.shape == (16,)
    assert 300 <= int(module.timesteps.min()) <= int(module.timesteps.max()) < 400
    alphas = module.pipeline.scheduler.alphas_cumprod[module.timesteps].view(-1, 1, 1, 1)
    noise = (module.noisy - alphas.sqrt() * module.latents[0].repeat(8, 1, 1, 1)) / (1 - alphas).sqrt()
    # Of 16 * 256 standard normal numbers.
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert abs(float(noise.mean())) < 0.06
    again = started(feed_forward(noises_per_prompt=8, min_timestep=300, max_timestep=400), fit)
    assert torch.equal(again.noisy, module.noisy)


def test_v1_is_compared_where_its_keys_were_taken(feed_forward: Build, fit: Fit) -> None:
    module = started(feed_forward(), fit)
    batch = torch.tensor([4 + 3, 1])  # item 3 is the second prompt at its second noise
    with torch.no_grad():
        items = [3, 1]
        noisy, timesteps = module.noisy[items], module.timesteps[items]
        prediction = module.unet(noisy, timesteps, states(module, PROMPTS[1], PROMPTS[1])).sample
        goal = module.unet(noisy, timesteps, states(module, TARGETS[1], TARGETS[1])).sample
    assert_close(module.training_step(batch, 0), (prediction - goal).square().mean(), rtol=1e-3, atol=0)
    assert (prediction - goal).abs().max() > 1e-4


def test_direct_values_are_the_unedited_layers_at_the_target_prompt(feed_forward: Build, fit: Fit) -> None:
    seen: dict[str, Tensor] = {}

    def keep(trainer: L.Trainer, module: Any, *_: Any) -> None:
        seen[module.state.name] = module.values_of(module.state).detach().clone()

    module = feed_forward(values="target", rounds=2)
    fit(module, hook("on_train_batch_start", keep), exact(), steps=1)
    assert module.pretrained.change_ratio() > 1e-3
    with module.pretrained.restored(), torch.no_grad(), capture_inputs(module.layers) as captured:
        module.unet(module.noisy, module.timesteps, states(module, *TARGETS * 2))
        for name in FF:
            assert_close(seen[name], captured[name] @ module.layers[name].weight.mT, rtol=0, atol=1e-4)


def test_retained_places_keep_their_outputs(feed_forward: Build, fit: Fit) -> None:
    def leak(edit: Any) -> float:
        module = feed_forward()
        fit(module, edit)
        assert module.report["weight_change_ratio"] > 1e-2
        ratios = []
        for name in FF:
            moment = module.retained[name].moment
            assert module.retained[name].count == 2 * 16 * 2  # two prompts and the empty one beside each, 16 places
            after, before = module.layers[name].weight.double(), module.pretrained.values[name].double()
            delta = after - before
            energy = ((delta @ moment) * delta).sum().clamp_min(0) / ((before @ moment) * before).sum()
            ratios.append(float(energy.sqrt()))
        return max(ratios)

    kept = leak(exact(ridge=0.1))
    # Float32 weights after an edit of several times their size.
    assert kept < 2e-6
    assert leak(by_least_squares(ridge=0.1)) > 1e3 * kept


def test_the_moment_is_that_of_the_retained_prompts_pictures(
    feed_forward: Build, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[Tensor, Tensor]] = []

    def record(method: ValueRefinement, latents: Tensor, label: str) -> tuple[Tensor, Tensor]:
        result = noised(method, latents, label)
        if label == "retained":
            recorded.append(result)
        return result

    monkeypatch.setattr("lit_unlearn.methods.unet_value_refinement.noised", record)
    module = started(feed_forward(noises_per_retained_prompt=2), fit)
    ((noisy, timesteps),) = recorded
    assert len(noisy) == 4
    total = dict.fromkeys(FF, torch.zeros(128, 128).double())
    longest = dict.fromkeys(FF, 0.0)
    for prompts in (module.retain_prompts * 2, [""] * 4):
        with torch.no_grad(), capture_inputs(module.layers) as captured:
            module.unet(noisy, timesteps, states(module, *prompts))
        for name in FF:
            rows = captured[name].flatten(0, 1).double()
            total[name] = total[name] + rows.mT @ rows
            longest[name] = max(longest[name], float(rows.norm(dim=1).max()))
    for name in FF:
        # Float32 inputs of the UNet's last blocks.
        assert_close(module.retained[name].moment, total[name], rtol=1e-3, atol=1e-3 * float(total[name].max()))
        assert module.retained[name].largest_norm == pytest.approx(longest[name], rel=1e-3)
    assert module.concept_keys(module.layer_state(FF[0])) is None  # a key is a place of a picture
