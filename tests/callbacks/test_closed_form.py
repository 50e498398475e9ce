from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor
from torch.testing import assert_close

from helpers import LAYERS, by_least_squares, by_null_space, by_ridge_map
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.core.null_space import EmptyNullSpaceError, NullSpaceBasis
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.reach import on_retained_span, reach, retained_directions
from lit_unlearn.core.solvers import Retained, Solved, Solver, Write
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]


class Nudge(Solver):
    """Adds a small fixed matrix to every weight and keeps what it was given."""

    delta = torch.linspace(-0.01, 0.01, 32, dtype=torch.float64).unsqueeze(1).expand(32, 128)

    def __init__(self) -> None:
        self.given: list[Write] = []

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        self.given += writes
        return [Solved(self.delta, {"largest": float(write.rounded(self.delta).abs().max())}) for write in writes]


def exact_null_space(**arguments: Any) -> ClosedFormEdit:
    """Directions in which the retained prompts of ``pets`` have no key at all; small keys ask for a small ridge."""
    return by_null_space(**{"threshold": 1e-8, "rule": "max", "ridge": 1e-3, **arguments})


def retained(module: ValueRefinement) -> tuple[Tensor, list[Tensor]]:
    """States of the retained prompts, and their keys K0 at both layers."""
    layers = {name: module.pipeline.linear(name) for name in LAYERS}
    with torch.no_grad(), capture_inputs(layers) as keys:
        states = encode_prompts(module.pipeline.tokenizer, module.text_encoder, module.retain_prompts)
    return states, [keys[name] for name in LAYERS]


def spaces_of(edit: ClosedFormEdit) -> dict[Retained, NullSpaceBasis]:
    """The null spaces that the solver of ``edit`` has found."""
    assert isinstance(edit.solver, NullSpace)
    return edit.solver.null_spaces


def relative(changed: Tensor, original: Tensor) -> float:
    return float((changed.double() - original.double()).norm() / original.double().norm())


# --- when and what is written


def test_an_edit_is_written_when_its_layer_ends(refinement: Refinement, fit: Fit) -> None:
    module, solver = refinement(rounds=2, positions="content"), Nudge()
    trainer = fit(module, ClosedFormEdit(solver))
    assert [write.name for write in solver.given] == LAYERS * 2
    # "a dog" and "the dog at sunset" have six tokens between BOS and EOS.
    assert all((write.keys.shape, write.values.shape) == ((6, 128), (6, 32)) for write in solver.given)
    assert all(write.weight.dtype == torch.float64 for write in solver.given)
    # As the model gives them: the solver turns them into float64 where it needs it.
    assert all(write.keys.dtype == write.values.dtype == torch.float32 for write in solver.given)
    assert all(write.retained is module.retained[write.name] for write in solver.given)
    for name in LAYERS:
        # Float32 weights of order 1, nudged twice.
        now, before = module.pipeline.named_parameters()[name], module.pretrained.values[name]
        assert_close(now, before + 2 * solver.delta.float(), rtol=0, atol=1e-5)
    assert {"edit/largest"} <= set(trainer.callback_metrics)


def test_the_report_is_of_what_the_weight_took_up(refinement: Refinement, fit: Fit) -> None:
    module, solver, losses = refinement(rounds=2), Nudge(), []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    fit(module, ClosedFormEdit(solver), Losses(), steps=3)
    assert set(module.report["layers"]) == set(LAYERS)
    for place, name in enumerate(LAYERS):
        write = solver.given[2 + place]
        delta, weight = write.rounded(solver.delta), write.weight
        now = module.pipeline.named_parameters()[name].double()
        assert torch.equal(weight + delta, now)
        # Without a pull the loss is the error. The second round begins with the seventh step.
        first, _, last = losses[6 + 3 * place : 9 + 3 * place]
        expected = {"round": 2, "largest": float(delta.abs().max()), "first_error": first, "last_error": last}
        reported = {key: value for key, value in module.report["layers"][name].items() if "reach" not in key}
        assert reported == expected
        assert not torch.equal(delta, solver.delta)  # float32 rounds


def test_drift_and_change_are_measured_on_the_model(refinement: Refinement, fit: Fit) -> None:
    module = refinement()
    fit(module, ClosedFormEdit(Nudge()))
    edited, _ = retained(module)
    with module.pretrained.restored():
        original, _ = retained(module)
    assert module.report["retained_state_drift"] == pytest.approx(relative(edited, original), rel=1e-4)
    assert module.report["retained_state_drift"] > 1e-3
    assert module.report["weight_change_ratio"] == module.pretrained.change_ratio() > 1e-3


@pytest.mark.parametrize("edit", [by_null_space(), by_least_squares()])
def test_another_method_is_refused_before_it_loads(edit: ClosedFormEdit, trainer_with: Fit, pets: str) -> None:
    class Plain(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

        def configure_model(self) -> None:
            pytest.fail("loaded")

    problem = "ClosedFormEdit writes the weights of closed-form methods, but the module is Plain"
    with pytest.raises(ValueError, match=problem):
        trainer_with(edit, max_epochs=1).fit(Plain(), torch.utils.data.DataLoader([1]))


def test_a_null_space_of_dimension_zero_is_refused_before_the_first_step(refinement: Refinement, fit: Fit) -> None:
    # The 285 retained prompts of emoji20 use all 128 directions.
    module = refinement(concept_set="emoji20")
    with pytest.raises(EmptyNullSpaceError, match=r"threshold=1e-14 needs .* Quantiles of the spectrum"):
        fit(module, by_null_space(threshold=1e-14, rule="max"), steps=1)
    assert module.progress == {"prepared": -1, "applied": 0}
    assert module.pretrained.change_ratio() == 0


# --- the reach


def reaches_of(module: ValueRefinement, write: Write, span: NullSpaceBasis | Tensor) -> Tensor:
    """The reach of the keys of ``write`` from the first token of the concept on, at the weight as it is now."""
    assert write.concept_keys is not None and write.retained.largest_norm is not None
    weight = module.layers[write.name].weight.detach().double()
    old = write.keys[write.concept_keys].double() @ write.weight.mT
    return reach(on_retained_span(weight, span), old, write.retained.largest_norm)


def test_the_reach_is_of_the_first_round_and_no_edit_in_the_null_space_raises_it(
    refinement: Refinement, fit: Fit
) -> None:
    class Watched(NullSpace):
        """Keeps what it was given."""

        def solve(self, writes: Sequence[Write]) -> list[Solved]:
            given.extend(writes)
            return super().solve(writes)

    given: list[Write] = []
    module = refinement(rounds=2, values="target")
    edit = ClosedFormEdit(Watched(112, "count", ridge=1e-3))
    fit(module, edit, steps=1)
    layers, medians = module.report["layers"], []
    for write in given[: len(LAYERS)]:  # the first round
        space = spaces_of(edit)[write.retained]
        assert space.dimension == 112  # of 128: the rest does not fill the 32 outputs
        found = reaches_of(module, write, space)
        # W and its change are rounded to float32; the reach itself is above that.
        assert layers[write.name]["reach"] == pytest.approx(float(found.quantile(0.5)), abs=1e-5)
        assert layers[write.name]["least_reach"] == pytest.approx(float(found.min()), abs=1e-5)
        assert layers[write.name]["reach"] > layers[write.name]["least_reach"] > 1e-4
        assert layers[write.name]["round"] == 2
        medians.append(layers[write.name]["reach"])
    assert module.report["reach"] == min(medians)
    later = reaches_of(module, given[len(LAYERS) + 1], spaces_of(edit)[given[len(LAYERS) + 1].retained])
    assert abs(float(later.quantile(0.5)) - medians[1]) > 1e-3  # the keys of the second round are others
    assert module.report["weight_change_ratio"] > 1e-3


def test_without_a_null_space_the_reach_is_that_of_the_leading_directions(refinement: Refinement, fit: Fit) -> None:
    module, solver = refinement(last_layer=1, values="target"), Nudge()
    trainer = fit(module, ClosedFormEdit(solver), steps=1)
    (write,) = solver.given
    assert write.retained.moment is not None
    with module.pretrained.restored():
        found = reaches_of(module, write, retained_directions(write.retained.moment))
    assert module.report["reach"] == pytest.approx(float(found.quantile(0.5)), rel=1e-9)
    assert float(trainer.callback_metrics["edit/reach"]) == pytest.approx(module.report["reach"], rel=1e-6)


def test_where_nothing_is_retained_there_is_no_reach(tiny_sd: Path, pets: str, fit: Fit) -> None:
    common = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
    for preserve, reported in (("others", 8), (None, 0)):
        module = UCE(preserve=preserve, preserve_tokens="last_subject", **common)  # type: ignore[arg-type]
        fit(module, by_ridge_map())
        assert sum("reach" in layer for layer in module.report["layers"].values()) == reported
        assert ("reach" in module.report) == bool(reported)


# --- what the null space keeps


def test_retained_prompts_keep_their_states(refinement: Refinement, fit: Fit) -> None:
    def edited(edit: ClosedFormEdit) -> tuple[ValueRefinement, float]:
        module = refinement(rounds=2)
        fit(module, edit)
        states, _ = retained(module)
        with module.pretrained.restored():
            return module, relative(states, retained(module)[0])

    constrained, drift = edited(exact_null_space())
    unconstrained, drift_without = edited(by_least_squares(ridge=1e-3))
    assert constrained.report["weight_change_ratio"] > 1e-2
    # K0 Delta is zero up to the rounding of the float32 weights, 6e-8, and what a layer norm makes of it.
    assert drift < 1e-5
    assert drift_without > 100 * drift
    for name in LAYERS:
        ours, theirs = (module.report["layers"][name] for module in (constrained, unconstrained))
        assert ours["leak"] < 1e-6
        assert theirs["leak"] > 100 * ours["leak"]
        assert ours["retained_kept"] < 1e-6
        assert 0.05 < ours["keys_kept"] < 1
        assert ours["null_space_dimension"] >= 64


def test_edited_prompts_move_towards_their_values(refinement: Refinement, fit: Fit) -> None:
    module, kept = refinement(last_layer=1), {}

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            assert isinstance(module, ValueRefinement)
            assert module.state is not None
            kept.update(keys=module.state.keys, initial=module.state.initial, values=module.values.detach().clone())

    fit(module, Keep(), exact_null_space(ridge=1e-6), steps=6)
    outputs = kept["keys"] @ module.layers[LAYERS[0]].weight.detach().mT
    before = (kept["initial"] - kept["values"]).norm()
    # The edit is the least-squares solution of what the null space allows: never farther away, here a good deal nearer.
    assert (outputs - kept["values"]).norm() < 0.9 * before


def test_an_edit_leaves_the_retained_keys_of_later_layers(refinement: Refinement, fit: Fit) -> None:
    def keys_drift(edit: ClosedFormEdit) -> float:
        module = refinement(last_layer=1)
        fit(module, edit)
        _, (_, later) = retained(module)
        with module.pretrained.restored():
            return relative(later, retained(module)[1][1])

    drift = keys_drift(exact_null_space())
    # The leak of float32 weights once more, through one more block; so P of the unedited model serves all rounds.
    assert drift < 1e-5
    assert keys_drift(by_least_squares(ridge=1e-3)) > 100 * drift


def test_the_null_space_is_that_of_the_unedited_model(refinement: Refinement, fit: Fit) -> None:
    module, edit = refinement(rounds=2), exact_null_space()
    fit(module, edit)
    with module.pretrained.restored():
        _, keys = retained(module)
    for name, K0 in zip(LAYERS, keys, strict=True):
        space = spaces_of(edit)[module.retained[name]]
        K0 = K0.flatten(0, 1).double()
        # Eigenvalues below 1e-8 of the largest are singular values below 1e-4 of the largest.
        assert (K0 @ space.basis).norm() < 1e-4 * K0.norm()
        spectrum = module.report["spectrum"][name]
        assert spectrum == sorted(spectrum)
        assert len(spectrum) == 128
        # The trace of K0 K0^T is the sum of squares, twice in float64.
        assert sum(spectrum) == pytest.approx(float(K0.square().sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "dimension"),
    [({"threshold": 16, "rule": "count"}, 16), ({"threshold": 1e-30, "rule": "max", "minimum": 20}, 20)],
)
def test_the_rule_decides_the_dimension(
    arguments: dict[str, Any], dimension: int, refinement: Refinement, fit: Fit
) -> None:
    module, edit = refinement(), exact_null_space(**arguments)
    fit(module, edit)
    for name in LAYERS:
        found = spaces_of(edit)[module.retained[name]].dimension
        assert found == module.report["layers"][name]["null_space_dimension"]
        assert found >= dimension if arguments["rule"] == "max" else found == dimension


def test_the_unedited_methods_of_the_base_are_no_edit(tiny_sd: object, pets: str) -> None:
    with pytest.raises(ValueError, match="the module is ConceptEditor"):
        by_null_space().setup(
            L.Trainer(logger=False), ConceptEditor("dog", model=str(tiny_sd), concept_set=pets), "fit"
        )


def test_an_edit_of_an_edited_model_keeps_what_the_first_wrote(
    refinement: Refinement, fit: Fit, tmp_path: Path
) -> None:
    pairs = {"dog": "a soccer ball", "cat": "a parrot", "owl": "a castle"}
    concepts = {
        name: {
            "kind": "object",
            "target": target,
            "anchor": "a toy",
            "question": f"Is there {'an' if name == 'owl' else 'a'} {name} in this picture?",
            "direct": [f"one {name}"],
            "indirect": [f"number {number}"],
            "edit_prompts": [f"a {name}"],
            "target_prompts": [target],
        }
        for number, (name, target) in enumerate(pairs.items())
    }
    path = tmp_path / "three.yaml"
    counts = {"direct": 1, "indirect": 1, "edit": 1}
    path.write_text(
        yaml.safe_dump({"name": "three", "prompts_per_concept": counts, "concepts": concepts}), encoding="utf-8"
    )

    def dog(module: ValueRefinement) -> Tensor:
        with torch.no_grad():
            return encode_prompts(module.pipeline.tokenizer, module.text_encoder, ["a dog"])

    first = refinement(concept_set=str(path), values="residual")
    fit(first, exact_null_space(), steps=1)
    with first.pretrained.restored():
        original = dog(first)
    written = dog(first)
    assert relative(written, original) > 1e-2
    first.pipeline.save(tmp_path / "edited")
    arguments = {"concept": "cat", "concept_set": str(path), "model": str(tmp_path / "edited"), "values": "residual"}
    second = refinement(**arguments)
    fit(second, exact_null_space(), steps=1)
    assert second.pretrained.change_ratio() > 1e-2
    # Float32 weights and layer norms, as for any retained prompt.
    assert relative(dog(second), written) < 1e-4
    unconstrained = refinement(**arguments)
    fit(unconstrained, by_least_squares(ridge=1e-3, retain_weight=0.0), steps=1)
    assert relative(dog(unconstrained), written) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"ridge": -1.0}, r"edit\.ridge=-1\.0 must be zero or larger"),
        ({"retain_weight": float("nan")}, r"edit\.retain_weight=nan must be zero or larger"),
        ({"moment": "median"}, r"edit\.moment='median' is unknown: choose sum or mean"),
    ],
)
def test_wrong_weights_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        by_least_squares(**arguments)
