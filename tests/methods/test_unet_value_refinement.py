from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn import training
from lit_unlearn.callbacks.closed_form import LeastSquaresEdit, NullSpaceEdit
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.parameters import layer_label
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import add_noise
from lit_unlearn.methods.unet_value_refinement import (
    UNetFeedForwardRefinement,
    UNetValueRefinement,
    call_order,
    num_places,
)
from lit_unlearn.methods.value_refinement import ValueRefinement

CONFIGS = Path(__file__).parents[2] / "configs"
BLOCKS = [
    f"unet.{block}.transformer_blocks.0."
    for block in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
]
KV = [f"{block}attn2.{name}.weight" for block in BLOCKS for name in ("to_k", "to_v")]
FF = [f"{block}ff.net.2.weight" for block in BLOCKS]
PROMPTS, TARGETS = ["a dog", "the dog at sunset"], ["a soccer ball", "the soccer ball at sunset"]
ALIGNMENT = [0, 1, 3, *range(4, 32), 31]
"""Target position of each edit position: "dog" takes "ball", the last token of its target, and all behind it shifts."""

Build = Callable[..., Any]
Fit = Callable[..., L.Trainer]


@pytest.fixture
def keys_and_values(refinement: Callable[..., ValueRefinement]) -> Build:
    """Makes an edit of K and V of ``tiny_sd``; takes the arguments that shall differ."""
    return partial(refinement, UNetValueRefinement, watched_prompts=2)


@pytest.fixture
def feed_forward(refinement: Callable[..., ValueRefinement]) -> Build:
    """Makes an edit of the FFN of ``tiny_sd``; takes the arguments that shall differ."""
    return partial(refinement, UNetFeedForwardRefinement, watched_prompts=2, noises_per_prompt=2)


@pytest.fixture(scope="session")
def short_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``tiny_sd`` with texts of 8 tokens: two retained prompts and the empty one have fewer keys than K's 32 inputs."""
    folder = tmp_path_factory.mktemp("models") / "short-sd"
    shutil.copytree(tiny_sd, folder)
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 8}))
    return str(folder)


def exact(ridge: float = 1e-3) -> NullSpaceEdit:
    """Directions in which the retained prompts have no key at all: others have 1e-13 of the largest, zeros 1e-16."""
    return NullSpaceEdit(threshold=1e-14, rule="max", ridge=ridge)


def half() -> NullSpaceEdit:
    """Half of the 32 inputs of K and V, whatever the spectrum."""
    return NullSpaceEdit(threshold=16, rule="count", ridge=1e-3)


def weights(module: ValueRefinement) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.components.named_parameters().items()}


def changed(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def states(module: ValueRefinement, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        return encode_prompts(module.components.tokenizer, module.text_encoder, prompts)


class At(L.Callback):
    """Calls a function with the module at one hook of the trainer, without gradients."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        def call(trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                function(module)

        setattr(self, name, call)


class Interrupted(Exception):
    pass


def started(module: Any, fit: Fit, **data: Any) -> Any:
    """``module`` in its first layer, before the first step."""

    def interrupt(_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(module, At("on_train_batch_start", interrupt), **data)
    module.log_dict = lambda *_, **__: None  # nothing to log to outside of a run
    return module


# --- what is edited


def test_layers_come_in_the_order_of_the_unets_calls(keys_and_values: Build, feed_forward: Build) -> None:
    for build, names in ((keys_and_values, KV), (feed_forward, FF)):
        module = build()
        module.configure_model()
        assert module.edited_names == names
        called: list[str] = []
        for name, layer in module.layers.items():
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
        sample = torch.zeros(1, 4, 8, 8)
        module.unet(sample, 10, torch.zeros(1, 32, 32))
        assert called == names


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (KV[0], "down 1.0 K"),
        (KV[3], "mid 0 V"),
        (FF[3], "up 0.1 FF"),
        (FF[3].replace("blocks.0.ff", "blocks.2.ff"), "up 0.1.2 FF"),
        ("text_encoder.encoder.layers.11.mlp.fc2.weight", "layer 11"),
    ],
)
def test_layers_have_short_names(name: str, label: str) -> None:
    assert layer_label(name) == label


def test_order_is_by_number_and_not_by_digit() -> None:
    names = [f"unet.down_blocks.{n}.attentions.0.transformer_blocks.0.ff.net.2.weight" for n in (10, 2)]
    assert sorted(names, key=call_order) == names[::-1]


@pytest.mark.parametrize("side", [8, 12, 64])
def test_places_are_those_of_the_blocks_picture(feed_forward: Build, side: int) -> None:
    module = feed_forward()
    module.configure_model()
    with torch.no_grad(), capture_inputs(module.layers) as captured:
        module.unet(torch.zeros(1, 4, side, side), 10, torch.zeros(1, 32, 32))
    config = {**module.unet.config, "sample_size": side}
    assert {name: num_places(config, name) for name in FF} == {name: captured[name].shape[1] for name in FF}


def test_places_of_stable_diffusion() -> None:
    config = {"sample_size": 64, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    names = ["down_blocks.0.x", "down_blocks.2.x", "mid_block.x", "up_blocks.1.x", "up_blocks.3.x"]
    assert [num_places(config, f"unet.{name}") for name in names] == [64**2, 16**2, 8**2, 16**2, 64**2]


@pytest.mark.parametrize(
    ("kind", "arguments", "problem"),
    [
        (
            UNetValueRefinement,
            {"edited_parameters": "text-fc2"},
            "'text-fc2' selects text_encoder.*UNetValueRefinement",
        ),
        (UNetValueRefinement, {"edited_parameters": "xattn"}, r"attn2\.to_out.* edits only attn2\.to_k\.weight and"),
        (UNetFeedForwardRefinement, {"edited_parameters": "xattn-kv"}, r"edits only ff\.net\.2\.weight of the UNet"),
        (UNetFeedForwardRefinement, {"edited_parameters": r"ff\.net\.2"}, r"selects .*net\.2\.bias"),
        (UNetValueRefinement, {"edited_parameters": "nothing"}, "'nothing' selects no parameter"),
        (
            UNetValueRefinement,
            {"values": "residual"},
            "values='residual' is not for UNetValueRefinement: choose refined",
        ),
        (
            UNetFeedForwardRefinement,
            {"start": "residual"},
            "start='residual' is not for UNetFeedForward.*output or tar",
        ),
        (UNetValueRefinement, {"watched_prompts": 0}, r"model\.watched_prompts=0 must be at least 1"),
        (UNetFeedForwardRefinement, {"noises_per_prompt": 0}, r"model\.noises_per_prompt=0 must be at least 1"),
        (UNetFeedForwardRefinement, {"noises_per_retained_prompt": 0}, "noises_per_retained_prompt=0 must be at least"),
        (UNetValueRefinement, {"concept": ["dog", "cat"]}, "leaves no prompt of pets to retain"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    kind: type, arguments: dict[str, Any], problem: str, refinement: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.methods.base.load_components", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        refinement(kind, **arguments)


# --- keys and values of cross-attention


def test_keys_are_the_text_states_and_v1_starts_at_the_layers_output(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(), fit)
    expected = states(module, PROMPTS)
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
        noisy = add_noise(module.components.scheduler, latents, noise, timesteps)
        prediction = module.unet(noisy, timesteps, states(module, PROMPTS)).sample
        seen_by_edited = module.unet(noisy, timesteps, states(module, TARGETS)).sample
        with module.pretrained.restored():
            goal = module.unet(noisy, timesteps, states(module, TARGETS)).sample
    # Float32 noise predictions of batches of two.
    assert_close(module.training_step(batch, 0), (prediction - goal).square().mean(), rtol=1e-4, atol=0)
    assert (seen_by_edited - goal).abs().max() > 1e-3
    assert changed(weights(module), edited) == []


def test_gradients_reach_v1_alone_and_only_at_its_positions(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(positions="eot"), fit)
    module.training_step(torch.tensor([0, 1]), 0).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["values"]
    assert not module.values.grad[~module.mask].any()
    assert module.values.grad[module.mask].any()


def test_direct_values_are_those_of_the_target_prompt(keys_and_values: Build, fit: Fit) -> None:
    seen: dict[str, Tensor] = {}

    def keep(module: Any) -> None:
        seen[module.state.name] = module.values_of(module.state).clone()

    module = keys_and_values(values="target", rounds=2)
    fit(module, At("on_train_batch_start", keep), half(), steps=1)
    assert list(seen) == KV
    aligned = states(module, TARGETS)[:, ALIGNMENT]
    assert module.pretrained.change_ratio() > 1e-2
    for name in KV:  # of the unedited UNet, in the second round too
        assert_close(seen[name], aligned @ module.pretrained.values[name].mT, rtol=0, atol=1e-5)


def test_an_edit_writes_the_targets_keys_and_values(keys_and_values: Build, fit: Fit) -> None:
    module = keys_and_values(values="target", positions="content")
    # Six tokens are independent in 32 dimensions, so with every direction free and hardly a ridge nothing is left over.
    fit(module, LeastSquaresEdit(ridge=1e-8, retain_weight=0.0), steps=1)
    keys, wanted = states(module, PROMPTS)[module.mask], states(module, TARGETS)[:, ALIGNMENT][module.mask]
    assert len(keys) == 6
    for name in KV:
        before, after = module.pretrained.values[name], module.layers[name].weight.detach()
        wished = wanted @ before.mT
        # Float32 sums of 32 products.
        assert_close(keys @ after.mT, wished, rtol=0, atol=1e-3)
        assert (keys @ before.mT - wished).abs().max() > 0.1


def test_retained_prompts_keep_their_keys_and_values(keys_and_values: Build, short_sd: str, fit: Fit) -> None:
    def outputs(module: Any) -> list[Tensor]:
        rows = states(module, [*module.retain_prompts, ""])
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
    without, other = moved(LeastSquaresEdit(ridge=1e-3, retain_weight=0.0))
    assert without > 1e3 * kept
    assert other["retained_state_drift"] > 100 * report["retained_state_drift"]
    # Unless it is asked for, the empty prompt is not among them.
    assert moved(exact(), retain_empty=False)[0] > 1e3 * kept


def test_the_moment_holds_the_empty_prompt_as_often_as_all_others(keys_and_values: Build, fit: Fit) -> None:
    module = started(keys_and_values(), fit)
    rows = states(module, module.retain_prompts).flatten(0, 1).double()
    empty = states(module, [""])[0].double()
    for name in KV:
        moment, count = module.moments[name]
        assert_close(moment, rows.mT @ rows + 2 * empty.mT @ empty, rtol=1e-10, atol=1e-10)
        assert count == 2 * len(rows) == 128


# --- the FFN


def test_keys_are_what_enters_the_layer_at_the_fixed_noises(feed_forward: Build, fit: Fit) -> None:
    module = started(feed_forward(noises_per_prompt=3), fit)
    assert module.num_pairs == 6
    seen: dict[str, list[Tensor]] = {name: [] for name in FF}
    for name, layer in module.layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        module.unet(module.noisy, module.timesteps, states(module, PROMPTS * 3))
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
    alphas = module.components.scheduler.alphas_cumprod[module.timesteps].view(-1, 1, 1, 1)
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
        prediction = module.unet(noisy, timesteps, states(module, [PROMPTS[1], PROMPTS[1]])).sample
        goal = module.unet(noisy, timesteps, states(module, [TARGETS[1], TARGETS[1]])).sample
    assert_close(module.training_step(batch, 0), (prediction - goal).square().mean(), rtol=1e-3, atol=0)
    assert (prediction - goal).abs().max() > 1e-4


def test_direct_values_are_the_unedited_layers_at_the_target_prompt(feed_forward: Build, fit: Fit) -> None:
    seen: dict[str, Tensor] = {}

    def keep(module: Any) -> None:
        seen[module.state.name] = module.values_of(module.state).clone()

    module = feed_forward(values="target", rounds=2)
    fit(module, At("on_train_batch_start", keep), exact(), steps=1)
    assert module.pretrained.change_ratio() > 1e-3
    with module.pretrained.restored(), torch.no_grad(), capture_inputs(module.layers) as captured:
        module.unet(module.noisy, module.timesteps, states(module, TARGETS * 2))
        for name in FF:
            assert_close(seen[name], captured[name] @ module.layers[name].weight.mT, rtol=0, atol=1e-4)


def test_retained_places_keep_their_outputs(feed_forward: Build, fit: Fit) -> None:
    def leak(edit: Any) -> float:
        module = feed_forward()
        fit(module, edit)
        assert module.report["weight_change_ratio"] > 1e-2
        ratios = []
        for name in FF:
            moment, count = module.moments[name]
            assert count == 2 * 16 * 2  # two prompts and the empty one beside each, 16 places
            after, before = module.layers[name].weight.double(), module.pretrained.values[name].double()
            delta = after - before
            energy = ((delta @ moment) * delta).sum().clamp_min(0) / ((before @ moment) * before).sum()
            ratios.append(float(energy.sqrt()))
        return max(ratios)

    kept = leak(exact(ridge=0.1))
    # Float32 weights after an edit of several times their size.
    assert kept < 2e-6
    assert leak(LeastSquaresEdit(ridge=0.1)) > 1e3 * kept


def test_the_moment_is_that_of_the_retained_prompts_pictures(feed_forward: Build, fit: Fit) -> None:
    recorded: list[tuple[Tensor, Tensor]] = []

    class Recording(UNetFeedForwardRefinement):
        def noised(self, latents: Tensor, label: str) -> tuple[Tensor, Tensor]:
            result = super().noised(latents, label)
            if label == "retained":
                recorded.append(result)
            return result

    module = started(feed_forward.func(Recording, noises_per_retained_prompt=2), fit)  # type: ignore[attr-defined]
    ((noisy, timesteps),) = recorded
    assert len(noisy) == 4
    total = dict.fromkeys(FF, torch.zeros(128, 128).double())
    for prompts in (module.retain_prompts * 2, [""] * 4):
        with torch.no_grad(), capture_inputs(module.layers) as captured:
            module.unet(noisy, timesteps, states(module, prompts))
        for name in FF:
            rows = captured[name].flatten(0, 1).double()
            total[name] = total[name] + rows.mT @ rows
    for name in FF:
        # Float32 inputs of the UNet's last blocks.
        assert_close(module.moments[name][0], total[name], rtol=1e-3, atol=1e-3 * float(total[name].max()))


# --- both


@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_only_the_layer_of_the_epoch_moves_and_refinement_lowers_the_error(
    kind: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    build, names = request.getfixturevalue(kind), KV if kind == "keys_and_values" else FF
    module = build(rounds=1)
    seen: list[dict[str, Tensor]] = []
    trainer = fit(
        module,
        At("on_train_epoch_start", lambda module: seen.append(weights(module))),
        half(),
        At("on_train_end", lambda module: seen.append(weights(module))),
        steps=3,
    )
    assert [changed(before, after) for before, after in zip(seen, seen[1:], strict=False)] == [[name] for name in names]
    assert (trainer.current_epoch, trainer.global_step) == (len(names), 3 * len(names))
    assert set(module.report["layers"]) == set(names) == set(module.report["spectrum"])
    if kind == "feed_forward":  # whose noise is the same in every step
        assert all(layer["last_error"] < layer["first_error"] for layer in module.report["layers"].values())


@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_drift_is_that_of_noise_predictions_at_retained_prompts(
    kind: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)(values="target")
    fit(module, half(), steps=1)
    with torch.no_grad():
        asked = (module.watched_noisy, module.watched_timesteps, states(module, ["a cat", "the cat in the rain"]))
        after = module.unet(*asked).sample
        with module.pretrained.restored():
            before = module.unet(*asked).sample
    expected = float((after - before).norm() / before.norm())
    assert module.report["retained_state_drift"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6


def test_what_is_measured_is_no_cost(keys_and_values: Build, feed_forward: Build, fit: Fit) -> None:
    module = keys_and_values(rounds=2)
    fit(module, half(), steps=3)
    # Latents of 2 prompts with guidance, one step; then 2 rounds of 8 layers of 3 steps of 2 prompts, goal and present.
    assert module.current_cost()["unet_forwards"] == 2 * 2 + (2 * 8 * 3) * 2 * 2
    assert module.current_cost()["unet_backwards"] == (2 * 8 * 3) * 2
    direct = keys_and_values(values="target")
    fit(direct, half(), steps=1)
    assert direct.current_cost()["unet_forwards"] == 0
    module = feed_forward()
    fit(module, exact(), steps=3)
    # Pictures of 2 retained and 2 edit prompts; K0 of 2 prompts and the empty one; goals of 4 items; then K1 and steps.
    assert module.current_cost()["unet_forwards"] == 4 + 4 + 2 * 2 + 4 + 4 * (4 + 3 * 4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
@pytest.mark.parametrize(("hook", "every"), [("on_train_epoch_start", None), ("on_train_batch_end", 1)])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    kind: str, hook: str, every: int | None, fit: Fit, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def stop(module: Any) -> None:
        if module.current_epoch == 2 and module.trainer.global_step > 4 * (hook == "on_train_batch_end"):
            raise Interrupted

    # Much ridge, so that float64 rounding stays below a bit of the weights.
    edit = partial(NullSpaceEdit, threshold=16, rule="count", ridge=0.1)
    pattern = r"mid_block.*attn2\.to_[kv]\.weight" if kind == "keys_and_values" else r"up_blocks.*ff\.net\.2\.weight"
    build = partial(request.getfixturevalue(kind), edited_parameters=pattern, rounds=2)
    whole, first, resumed = build(), build(), build()
    fit(whole, edit(), steps=2)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every)
    with pytest.raises(Interrupted):
        fit(first, At(hook, stop), edit(), keep(), steps=2)
    trainer = fit(resumed, edit(), keep(), steps=2, ckpt_path=tmp_path / "saved/last.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (4, 8)
    assert changed(weights(whole), weights(resumed)) == []
    assert whole.pretrained.change_ratio() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_velocity_prediction_and_half_precision(
    kind: str, dtype: str, tiny_sd2: Path, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)(model=str(tiny_sd2), dtype=dtype)
    fit(module, half(), steps=1)
    edited = weights(module)
    assert {value.dtype for value in edited.values()} == {getattr(torch, dtype)}
    assert all(value.isfinite().all() for value in edited.values())
    assert module.pretrained.change_ratio() > 0


@pytest.mark.parametrize(
    ("recipe", "model"),
    [(name, model) for name in ("null_space_unet", "null_space_unet_ffn") for model in ("tiny_sd", "tiny_sd2")]
    + [("null_space_unet", "emoji-sd"), ("null_space_unet_ffn", "emoji-sd")],
)
def test_a_recipe_fits(
    recipe: str, model: str, pets: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = model == "emoji-sd"
    path, concept = ("emoji-sd", "dog") if embedded else (str(request.getfixturevalue(model)), "[dog, rain]")
    args = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--model.init_args.model", path, "--concept", concept]
    args += ["--model.init_args.concept_set", pets] if embedded else ["--data.init_args.batch_size", "4"]
    args += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.init_args.steps", "1"]
    args += ["--trainer.enable_model_summary", "false", "--model.init_args.num_inference_steps", "1"]
    if not embedded:  # random weights have another spectrum
        edit = {"class_path": "NullSpaceEdit", "init_args": {"threshold": 8, "rule": "count"}}
        args += ["--trainer.callbacks", json.dumps([edit])]
    cli = training.run(["fit", *args, "--model.init_args.rounds", "1"])
    assert cli.trainer.global_step == len(cli.model.edited_names)
    assert cli.model.report["weight_change_ratio"] > 0
    (saved,) = tmp_path.glob(f"logs/{recipe}/dog*/version_0/checkpoints/last.ckpt")
    kept = torch.load(saved, weights_only=True)["state_dict"]
    assert set(kept) == {*cli.model.edited_names, "values"}
    assert all(value.isfinite().all() for value in kept.values())
