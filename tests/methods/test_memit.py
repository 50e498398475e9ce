from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from helpers import CONFIGS, LAYERS, QUIET, Interrupted, by_least_squares, by_null_space, changed, interrupt, weights
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.core.solvers import Solved, Solver, Write
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.prompts import tokenize
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.training import cli as training

Refinement = Callable[..., MEMIT]
Fit = Callable[..., L.Trainer]


@pytest.fixture
def memit(refinement: Callable[..., ValueRefinement]) -> Refinement:
    """Makes a ``MEMIT`` of the dog in ``tiny_sd``; takes the arguments that shall differ."""
    return partial(refinement, MEMIT)  # type: ignore[return-value]


class Keep(L.Callback):
    """Keeps z, as it is before the layers are written, and the weights at that moment."""

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, MEMIT)
        assert module.state is not None
        self.shift = module.values_of(module.state) - module.state.initial
        self.before = stream(module, 2)
        self.goal = self.before + self.shift
        self.weights = {name: module.layers[name].weight.double().clone() for name in module.edited_names}


class Written(Solver):
    """Fulfils what is asked for as well as a weight can, and keeps what was asked, with the stream at that time."""

    def __init__(self, module: ValueRefinement) -> None:
        self.module = module
        self.asked: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        (write,) = writes  # the next one is measured once this one is written
        keys = write.keys.double()
        residual = write.values.double() - keys @ write.weight.mT
        self.asked.append((write.name, keys, residual, stream(self.module, 2)))
        return [Solved(torch.linalg.lstsq(keys, residual).solution.mT, {})]


@torch.no_grad()
def stream(module: ValueRefinement, layer: int) -> Tensor:
    """What ``layer`` puts out at the edit prompts, seen by a hook of our own."""
    seen: list[Tensor] = []
    block = module.text_encoder.encoder.layers[layer]
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    module.text_encoder(module.paired.first.edit_ids)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


# --- the formula


@pytest.mark.parametrize("moment", ["mean", "sum"])
def test_an_edit_solves_the_normal_equations_of_memit(memit: Refinement, fit: Fit, moment: str) -> None:
    lamb, keep = 3.0, Keep()
    module = memit(last_layer=1, values="residual")
    fit(module, keep, by_least_squares(ridge=1e-6, retain_weight=lamb, moment=moment), steps=1)
    found = module.layers[LAYERS[0]].weight.detach().double() - keep.weights[LAYERS[0]]
    with module.pretrained.restored(), torch.no_grad(), capture_inputs(module.layers) as captured:
        keys = []
        for prompts in (module.edit_prompts, module.retain_prompts):
            module.text_encoder(tokenize(module.pipeline.tokenizer, prompts))
            keys.append(captured[LAYERS[0]].double().flatten(0, 1))
        streams = [
            module.text_encoder(ids, output_hidden_states=True).hidden_states[2].double()
            for ids in (module.paired.first.edit_ids, module.paired.first.target_ids)
        ]
    aligned = torch.stack([rows[module.paired.first.alignment[i]] for i, rows in enumerate(streams[1])])
    # From here on as in the paper: columns are tokens. The least-squares problem, one block of rows for each term.
    K1, K0, R = keys[0].mT, keys[1].mT, (aligned - streams[0]).flatten(0, 1).mT
    K0 = K0 * (lamb / (K0.shape[1] if moment == "mean" else 1)) ** 0.5
    system = torch.cat([K1, K0, 1e-3 * torch.eye(128).double()], dim=1)
    right = torch.cat([R, torch.zeros(32, K0.shape[1] + 128).double()], dim=1)
    delta = torch.linalg.lstsq(system.mT, right.mT, driver="gelsd").solution.mT
    # Float32 keys and weights; the problem's condition is about 1e4.
    assert (found - delta).norm() < 1e-3 * delta.norm()
    assert delta.norm() > 1e-2 * keep.weights[LAYERS[0]].norm()


def test_mean_and_sum_differ_by_the_number_of_keys(memit: Refinement, fit: Fit) -> None:
    modules = [memit(values="residual") for _ in range(3)]
    # Two retained prompts of 32 tokens.
    for module, (weight, moment) in zip(modules, [(1.0, "sum"), (64.0, "mean"), (64.0, "sum")], strict=True):
        fit(module, by_least_squares(ridge=1e-3, retain_weight=weight, moment=moment), steps=1)
    one, same, other = (module.layers[LAYERS[0]].weight.detach() for module in modules)
    # Two ways to scale the same float64 matrix, then a cast.
    assert_close(one, same, rtol=0, atol=1e-6)
    assert (one - other).abs().max() > 1e-3


# --- z and its spread


def test_z_is_the_stream_with_v1_in_place(memit: Refinement, fit: Fit) -> None:
    class Check(L.Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            assert isinstance(module, MEMIT)
            assert module.state is not None
            assert module.state.name == LAYERS[1]
            shift = module.values_of(module.state) - module.state.initial
            assert shift.abs().max() > 0.1
            state = module.state
            handle = state.layer.register_forward_hook(lambda *_: module.values_of(state) + state.layer.bias)
            with_values = stream(module, 2)
            handle.remove()
            # Sums of float32 numbers of order 10.
            assert_close(with_values, module.initial_stream + shift, rtol=0, atol=1e-4)

    fit(memit(), Check(), steps=2)


def test_each_layer_takes_its_share_of_what_is_missing_when_it_is_written(memit: Refinement, fit: Fit) -> None:
    module, keep = memit(first_layer=0), Keep()
    written = Written(module)
    fit(module, keep, ClosedFormEdit(written), steps=3)
    assert [name for name, *_ in written.asked] == module.edited_names
    for place, (_, keys, residual, now) in enumerate(written.asked):
        share = (keep.goal - now) / (3 - place)
        # Float32 sums of order 10, in two orders.
        assert_close(residual.float(), share.flatten(0, 1), rtol=0, atol=1e-4)
        assert keys.shape == (64, 128)
    # The keys are those of the model as edited so far, not of the one at the start.
    with torch.no_grad(), module.pretrained.restored():
        start = module.paired.keys(module.edited_names[1], module.paired.first.edit_ids).flatten(0, 1)
    assert (written.asked[1][1] - start).norm() > 1e-3 * start.norm()


def test_after_the_last_layer_the_stream_is_z(memit: Refinement, fit: Fit) -> None:
    # Without BOS, whose only key would have to give several values, 62 keys are independent in 128 dimensions.
    module, keep = memit(positions="no_bos"), Keep()
    fit(module, keep, by_least_squares(ridge=1e-7, retain_weight=0.0), steps=4)
    mask = module.paired.first.mask
    missing = (stream(module, 2) - keep.goal)[mask].norm()
    # Float32 weights times keys of order 1 with a nearly singular system.
    assert missing < 1e-3 * keep.shift[mask].norm()
    assert keep.shift[mask].norm() > 1
    # The layers before have done their part: it is not the last one alone.
    assert set(changed(module.pretrained.values, {n: module.layers[n].weight.detach() for n in LAYERS})) == set(LAYERS)


def test_the_stream_is_that_behind_the_last_edited_layer(memit: Refinement, fit: Fit) -> None:
    module = memit(first_layer=0, last_layer=1)
    fit(module, Keep(), steps=1)
    found = module.layer_state(module.edited_names[-1]).stream
    assert torch.equal(found, stream(module, 1)) and not torch.equal(found, stream(module, 2))


def test_refinement_lowers_the_error(memit: Refinement, fit: Fit) -> None:
    class SameNoise(MEMIT):
        def noise(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
            return super().noise(batch % self.num_pairs, 0)

    losses: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    fit(memit.func(SameNoise), Record(), steps=12)  # type: ignore[attr-defined]
    assert losses[-1] < 0.5 * losses[0]


# --- bound and penalty


def test_z_stays_within_its_bound(memit: Refinement, fit: Fit) -> None:
    def shifts(max_shift: float | None) -> Tensor:
        module, keep = memit(max_shift=max_shift), Keep()
        fit(module, keep, steps=6)
        return keep.shift.norm(dim=-1) / keep.before.norm(dim=-1)

    bounded, free = shifts(0.02), shifts(None)
    assert bounded.max() < 0.02 * (1 + 1e-4)  # float32
    assert bounded.max() > 0.0199
    assert free.max() > 0.05


def test_a_start_out_of_bounds_is_shortened_in_its_direction(memit: Refinement, fit: Fit) -> None:
    modules = []
    for max_shift in (1e-3, None):
        module, keep = memit(values="residual", max_shift=max_shift), Keep()
        fit(module, keep, steps=1)
        modules.append((module, keep))
    (module, short), (_, full) = modules
    moved = full.shift.norm(dim=-1) > 0.1
    assert moved.any()
    assert_close(
        torch.cosine_similarity(short.shift, full.shift, dim=-1)[moved], torch.ones(int(moved.sum())), rtol=0, atol=1e-3
    )
    assert (short.shift.norm(dim=-1) <= 1e-3 * short.before.norm(dim=-1) * (1 + 1e-2)).all()


def test_the_penalty_is_that_of_the_reference(memit: Refinement, fit: Fit) -> None:
    losses: list[tuple[float, float]] = []

    class Compare(L.Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Tensor, step: int) -> None:
            if step == 1:
                module.log_dict = lambda *_, **__: None
                with_penalty = module.training_step(batch, step)
                module.shift_penalty = 0.0
                without = module.training_step(batch, step)
                shift = module.values_of(module.state) - module.state.initial
                ratios = [
                    shift[i, j].norm() / module.initial_stream[i, j].norm() ** 2 for i in range(2) for j in range(32)
                ]
                losses.append((float(with_penalty - without), float(700 * torch.stack(ratios).mean())))

    fit(memit(shift_penalty=700.0), Compare(), steps=2)
    (found, expected), *_ = losses
    # A difference of float32 losses of order 1.
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert expected > 1e-2


def test_the_penalty_keeps_z_near(memit: Refinement, fit: Fit) -> None:
    def shift(penalty: float) -> float:
        keep = Keep()
        fit(memit(shift_penalty=penalty), keep, steps=6)
        return float(keep.shift.norm())

    assert shift(1e4) < 0.8 * shift(0.0)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"max_shift": 0.0}, r"model\.max_shift=0\.0 must be positive, or null"),
        ({"max_shift": float("nan")}, r"model\.max_shift=nan must be positive"),
        ({"shift_penalty": -1.0}, r"model\.shift_penalty=-1\.0 must be zero or larger"),
        ({"rounds": 0}, r"model\.rounds=0 must be at least 1"),
        ({"edited_parameters": "xattn"}, "only weights of text layers"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    arguments: dict[str, Any], problem: str, memit: Refinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        memit(**arguments)


# --- runs


def test_one_epoch_is_one_round(memit: Refinement, fit: Fit) -> None:
    module = memit(rounds=2)
    trainer = fit(module, by_least_squares(moment="mean", retain_weight=100.0), steps=3)
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)
    assert {report["round"] for report in module.report["layers"].values()} == {2}
    assert set(module.report["layers"]) == set(LAYERS)
    assert module.report["weight_change_ratio"] > 0
    # Latents of 2 prompts with guidance, one step; then 2 rounds of 3 steps of 2 prompts, goal and present.
    assert module.current_cost()["unet_forwards"] == 2 * 2 + 2 * 3 * 2 * 2


def test_with_a_projector_it_is_alphaedit_and_retains(memit: Refinement, fit: Fit) -> None:
    def drift(edit: ClosedFormEdit) -> float:
        module = memit(rounds=2, values="residual")
        fit(module, edit, steps=1)
        assert module.report["weight_change_ratio"] > 1e-2
        return module.report["retained_state_drift"]

    retained = drift(by_null_space(threshold=1e-8, rule="max", ridge=1e-3))
    # K0 Delta is zero up to the rounding of the float32 weights, and what a layer norm makes of it.
    assert retained < 3e-5
    assert drift(by_least_squares(ridge=1e-3)) > 100 * retained


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("hook", "epoch", "every", "steps_in_checkpoint"),
    [
        pytest.param("on_train_epoch_start", 1, None, 3, marks=pytest.mark.slow),
        ("on_train_batch_end", 1, 1, 3),
        pytest.param("on_train_epoch_end", 0, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    hook: str, epoch: int, every: int | None, steps_in_checkpoint: int, memit: Refinement, fit: Fit, tmp_path: Path
) -> None:
    edit = partial(by_least_squares, ridge=0.1, retain_weight=10.0, moment="mean")
    build = partial(memit, rounds=2, max_shift=0.5, positions="no_bos")
    whole, first, resumed = build(), build(), build()
    fit(whole, edit(), steps=3)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every)
    with pytest.raises(Interrupted):
        fit(first, interrupt(hook, epoch=epoch), edit(), keep(), steps=3)
    last = tmp_path / "saved/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == steps_in_checkpoint
    trainer = fit(resumed, edit(), keep(), steps=3, ckpt_path=last)
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)
    assert changed(weights(whole), weights(resumed)) == []
    assert whole.pretrained.change_ratio() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        pytest.param("memit", "tiny_sd", marks=pytest.mark.slow),
        ("memit", "tiny_sd2"),
        ("memit_descent", "tiny_sd"),
        ("memit", "emoji-sd"),
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
    descends = recipe == "memit_descent"
    args += [*QUIET, *(["--data.init_args.steps", "2"] if descends else []), "--model.num_inference_steps", "1"]
    cli = training.run(["fit", *args])
    assert isinstance(cli.model, MEMIT)
    assert cli.trainer.global_step == (2 if descends else 1)
    assert cli.model.report["weight_change_ratio"] > 0
    (saved,) = tmp_path.glob(f"logs/{recipe}/dog*/version_0/checkpoints/last.ckpt")
    kept = torch.load(saved, weights_only=True)["state_dict"]
    assert set(kept) == {*cli.model.edited_names, "values"}
    assert all(value.isfinite().all() for value in kept.values())
