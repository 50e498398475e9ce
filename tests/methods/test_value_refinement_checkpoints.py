"""Saving, restoring and resuming an edit by ``ValueRefinement``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import LAYERS, Interrupted, by_null_space, changed, interrupt, weights
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]


def null_space_edit() -> ClosedFormEdit:
    """The exact null space, with a ridge that keeps the system well-conditioned: float64 rounding stays below a bit."""
    return by_null_space(threshold=1e-8, rule="max", ridge=0.1)


def saved(refinement: Refinement, fit: Fit, path: Path, **arguments: Any) -> ValueRefinement:
    """An edited module, and its checkpoint at ``path``."""
    module = refinement(**arguments)
    fit(module, null_space_edit()).save_checkpoint(path)
    return module


def test_a_checkpoint_restores_the_edit_bit_for_bit(
    refinement: Refinement, fit: Fit, trainer_with: Fit, pets: str, tmp_path: Path
) -> None:
    edited = saved(refinement, fit, tmp_path / "run.ckpt")
    assert edited.pretrained.change_ratio() > 1e-3
    again, data = refinement(), ConceptPrompts("dog", pets, images_per_prompt=1)
    (pictures,) = trainer_with().predict(again, data, ckpt_path=str(tmp_path / "run.ckpt"))
    assert changed(weights(edited), weights(again)) == []
    assert torch.equal(again.values, edited.values)
    items = data.test_dataloader().dataset.items
    prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
    assert torch.equal(pictures, edited.generate(prompts, seeds))
    with edited.pretrained.restored():
        assert not torch.equal(pictures, edited.generate(prompts, seeds))
    # The reference is the base model's, not the checkpoint's.
    assert again.pretrained.change_ratio() == edited.pretrained.change_ratio()
    assert again.report == edited.report
    assert again.current_cost() == edited.current_cost()


def test_a_checkpoint_holds_the_edited_weights_and_the_values_only(
    refinement: Refinement, fit: Fit, tmp_path: Path
) -> None:
    saved(refinement, fit, tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {*LAYERS, "values"}
    ours = checkpoint[CHECKPOINT_KEY]
    assert (ours["method"], ours["concepts"], ours["edited_names"]) == ("ValueRefinement", ["dog"], LAYERS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"concept": "cat"}, "The checkpoint edits dog, but concept is cat: pass --concept dog"),
        ({"first_layer": 2}, "other edited weights: give the recipe of its own fit"),
        ({"model": "tiny_sd2"}, "made from another base model"),
    ],
)
def test_a_checkpoint_of_another_edit_is_refused(
    arguments: dict[str, Any],
    problem: str,
    refinement: Refinement,
    fit: Fit,
    trainer_with: Fit,
    pets: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    saved(refinement, fit, tmp_path / "run.ckpt")
    if "model" in arguments:
        arguments = {"model": str(request.getfixturevalue(arguments["model"]))}
    data = ConceptPrompts("dog", pets)
    with pytest.raises(ValueError, match=problem):
        trainer_with().predict(refinement(**arguments), data, ckpt_path=str(tmp_path / "run.ckpt"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_module_that_was_interrupted_is_fitted_again_from_an_earlier_layer(
    refinement: Refinement, fit: Fit, tmp_path: Path
) -> None:
    whole, again = refinement(), refinement()
    fit(whole, null_space_edit(), steps=3)
    keep = partial(ModelCheckpoint, tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(Interrupted):
        fit(again, null_space_edit(), keep(), interrupt("on_train_batch_end", epoch=1, step=5), steps=3)
    fit(again, null_space_edit(), keep(), steps=3, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert changed(weights(whole), weights(again)) == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("every_n_train_steps", "stop"),
    [
        pytest.param(1, interrupt("on_train_batch_end", epoch=1, step=5), id="within a layer"),
        pytest.param(None, interrupt("on_train_epoch_start", epoch=1), id="between two layers"),
    ],
)
def test_mixed_precision_does_not_depend_on_an_interruption(
    every_n_train_steps: int | None, stop: L.Callback, refinement: Refinement, fit: Fit, tmp_path: Path
) -> None:
    whole, first, resumed = refinement(), refinement(), refinement()
    run = partial(fit, steps=3, precision="bf16-mixed")
    run(whole, null_space_edit())
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every_n_train_steps)
    with pytest.raises(Interrupted):
        run(first, null_space_edit(), stop, keep())
    run(resumed, null_space_edit(), keep(), ckpt_path=tmp_path / "saved/last.ckpt")
    assert changed(weights(whole), weights(resumed)) == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("every_n_train_steps", "stop", "steps_in_checkpoint"),
    [
        pytest.param(None, interrupt("on_train_epoch_start", epoch=2), 6, id="between two layers"),
        pytest.param(1, interrupt("on_train_batch_end", epoch=1, step=6), 5, id="within a layer"),
        pytest.param(
            3, interrupt("on_train_epoch_end", epoch=1), 6, id="between the last step of a layer and its edit"
        ),
        pytest.param(3, interrupt("on_train_epoch_end", epoch=3), 12, id="before the last edit"),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    every_n_train_steps: int | None,
    stop: L.Callback,
    steps_in_checkpoint: int,
    refinement: Refinement,
    fit: Fit,
    tmp_path: Path,
) -> None:
    build = partial(refinement, rounds=2)
    whole, first, resumed = build(), build(), build()
    fit(whole, null_space_edit(), steps=3)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every_n_train_steps)
    with pytest.raises(Interrupted):
        fit(first, stop, null_space_edit(), keep(), steps=3)
    last = tmp_path / "saved/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == steps_in_checkpoint
    trainer = fit(resumed, null_space_edit(), keep(), steps=3, ckpt_path=last)
    assert changed(weights(whole), weights(resumed)) == []
    assert (trainer.current_epoch, trainer.global_step) == (4, 12)
    assert whole.pretrained.change_ratio() > 1e-3
    for name in LAYERS:
        # Numbers of float64 solvers, whose last digits depend on where in memory the matrices lie.
        assert resumed.report["layers"][name] == pytest.approx(whole.report["layers"][name], rel=1e-6, abs=1e-12)
    for name in ("retained_state_drift", "weight_change_ratio"):
        assert resumed.report[name] == pytest.approx(whole.report[name], rel=1e-6)
