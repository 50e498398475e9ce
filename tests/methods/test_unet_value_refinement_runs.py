"""Runs of the null-space edit of the UNet: what moves, what is reported, what it costs, resuming, recipes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers import (
    CONFIGS,
    FF,
    KV,
    QUIET,
    Interrupted,
    by_null_space,
    changed,
    exact,
    half,
    hook,
    interrupt,
    states,
    weights,
)
from lit_unlearn.methods.shared import moments
from lit_unlearn.training import cli as training

Build = Callable[..., Any]
Fit = Callable[..., L.Trainer]


@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_only_the_layer_of_the_epoch_moves_and_refinement_lowers_the_error(
    kind: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    build, names = request.getfixturevalue(kind), KV if kind == "keys_and_values" else FF
    module = build(rounds=1)
    seen: list[dict[str, Tensor]] = []
    trainer = fit(
        module,
        hook("on_train_epoch_start", lambda trainer, module: seen.append(weights(module))),
        half(),
        hook("on_train_end", lambda trainer, module: seen.append(weights(module))),
        steps=3,
    )
    assert [changed(before, after) for before, after in pairwise(seen)] == [[name] for name in names]
    assert (trainer.current_epoch, trainer.global_step) == (len(names), 3 * len(names))
    assert set(module.report["layers"]) == set(names) == set(module.report["spectrum"]) == set(module.report["cutoffs"])
    if kind == "feed_forward":  # whose noise is the same in every step
        assert all(layer["last_error"] < layer["first_error"] for layer in module.report["layers"].values())


@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_drift_is_that_of_noise_predictions_at_retained_prompts(
    kind: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)(values="target")
    fit(module, half(), steps=1)
    with torch.no_grad():
        ((noisy, timesteps, _),) = module.watched.asked
        asked = (noisy, timesteps, states(module, "a cat", "the cat in the rain"))
        after = module.unet(*asked).sample
        with module.pretrained.restored():
            before = module.unet(*asked).sample
    expected = float((after - before).norm() / before.norm())
    assert module.report["retained_state_drift"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6


def test_what_is_measured_is_no_cost(keys_and_values: Build, feed_forward: Build, fit: Fit) -> None:
    module = keys_and_values(rounds=2)
    fit(module, half(), steps=3)
    # Latents of 2 prompts with guidance, one step; then 2 rounds of 8 layers of 3 steps of 2 prompts, and the goals of
    # each round.
    assert module.current_cost()["unet_forwards"] == 2 * 2 + (2 * 8 * 3) * 2 + (2 * 3) * 2
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
@pytest.mark.parametrize(
    ("kind", "name", "every", "epoch"),
    [
        pytest.param("keys_and_values", "on_train_epoch_start", None, 2, marks=pytest.mark.slow),
        ("keys_and_values", "on_train_batch_end", 1, 2),
        ("feed_forward", "on_train_batch_end", 1, 2),
        ("feed_forward, a layer at a time", "on_train_batch_end", 1, 3),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    kind: str,
    name: str,
    every: int | None,
    epoch: int,
    fit: Fit,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, _, single = kind.partition(",")
    if single:
        monkeypatch.setattr(moments, "MOST_HELD_BYTES", 1)
    # Much ridge, so that float64 rounding stays below a bit of the weights.
    edit = partial(by_null_space, threshold=16, rule="count", ridge=0.1)
    pattern = r"mid_block.*attn2\.to_[kv]\.weight" if kind == "keys_and_values" else r"up_blocks.*ff\.net\.2\.weight"
    build = partial(request.getfixturevalue(kind), edited_parameters=pattern, rounds=2)
    whole, first, resumed = build(), build(), build()
    fit(whole, edit(), steps=2)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every)
    with pytest.raises(Interrupted):
        fit(first, interrupt(name, epoch=epoch), edit(), keep(), steps=2)
    trainer = fit(resumed, edit(), keep(), steps=2, ckpt_path=tmp_path / "saved/last.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (4, 8)
    if kind == "feed_forward":
        assert len(resumed.retained_layers.holding.groups) == (2 if single else 1)
    assert changed(weights(whole), weights(resumed)) == []
    assert whole.pretrained.change_ratio() > 1e-4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_direct_edit_has_an_epoch_for_each_round_and_goes_on_between_two(
    keys_and_values: Build, fit: Fit, tmp_path: Path
) -> None:
    edit = partial(by_null_space, threshold=16, rule="count", ridge=0.1)
    build = partial(keys_and_values, edited_parameters=r"mid_block.*attn2\.to_[kv]\.weight", rounds=2, values="target")
    whole, first, resumed, older = build(), build(), build(), build()
    trainer = fit(whole, edit(), steps=1)
    assert (trainer.current_epoch, trainer.global_step) == (2, 2)
    assert [layer["round"] for layer in whole.report["layers"].values()] == [2, 2]
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True)
    with pytest.raises(Interrupted):
        fit(first, interrupt("on_train_epoch_start", epoch=1), edit(), keep(), steps=1)
    path = tmp_path / "saved/last.ckpt"
    fit(resumed, edit(), keep(), steps=1, ckpt_path=path)
    assert changed(weights(whole), weights(resumed)) == [] and whole.pretrained.change_ratio() > 1e-4
    checkpoint = torch.load(path, weights_only=True)
    assert "values" not in checkpoint["state_dict"]
    checkpoint["state_dict"]["values"] = torch.zeros(2, 32, 64)  # with an epoch for each map
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="of an earlier version, whose fit had an epoch for each map: begin it again"):
        fit(older, edit(), steps=1, ckpt_path=path)


@pytest.mark.parametrize("kind", ["keys_and_values", "feed_forward"])
def test_velocity_prediction_and_half_precision(
    kind: str, tiny_sd2: Path, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)(model=str(tiny_sd2), dtype="bfloat16")
    fit(module, half(), steps=1)
    edited = weights(module)
    assert {value.dtype for value in edited.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in edited.values())
    assert module.pretrained.change_ratio() > 0


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        pytest.param("null_space_unet", "tiny_sd", marks=pytest.mark.slow),
        ("null_space_unet", "tiny_sd2"),
        ("null_space_unet", "emoji-sd"),
        ("null_space_unet_ffn", "tiny_sd"),
        pytest.param("null_space_unet_ffn", "tiny_sd2", marks=pytest.mark.slow),
        pytest.param("null_space_unet_ffn", "emoji-sd", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_fits(
    recipe: str, model: str, pets: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = model == "emoji-sd"
    path, concept = ("emoji-sd", "dog") if embedded else (str(request.getfixturevalue(model)), "[dog, rain]")
    args = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--model.init_args.model", path, "--concept", concept]
    args += ["--model.init_args.concept_set", pets] if embedded else ["--data.init_args.batch_size", "4"]
    args += [*QUIET, "--model.init_args.num_inference_steps", "1"]
    if recipe != "null_space_unet_ffn":  # which has no descent
        args += ["--data.init_args.steps", "1"]
    if not embedded:  # random weights have another spectrum
        args += ["--trainer.callbacks", "[]", "--edit.threshold", "8", "--edit.rule", "count"]
    cli = training.run(["fit", *args, "--model.init_args.rounds", "1"])
    assert cli.trainer.global_step == len(cli.model.edited_names)
    assert cli.model.report["weight_change_ratio"] > 0
    (saved,) = tmp_path.glob(f"logs/{recipe}/dog*/version_0/checkpoints/last.ckpt")
    kept = torch.load(saved, weights_only=True)["state_dict"]
    assert set(kept) == {*cli.model.edited_names, "values"}
    assert all(value.isfinite().all() for value in kept.values())
