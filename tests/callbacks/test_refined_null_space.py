from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import by_refined_null_space, weights
from lit_unlearn.core.null_space import null_space_from_keys
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.speed import SPEED

Fit = Callable[..., L.Trainer]
SOLVERS = ("threshold", "rule", "minimum", "retain_scale", "lamb", "filter", "augment")
"""Settings of the solver; the others are the method's."""
EDITS: Any = WeakKeyDictionary()
"""The edit of each method that was built."""
Build = Callable[..., SPEED]
RETAIN = ["an owl", "a castle", "a lemon", "the sunset", "dancing", "rain"]


@pytest.fixture
def speed(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``SPEED`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> SPEED:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "retain": RETAIN, "threshold": 1e-6}
        given = {**defaults, **arguments}
        settings = {name: given.pop(name) for name in SOLVERS if name in given}
        module = SPEED(**given)
        EDITS[module] = by_refined_null_space(**settings)
        return module

    return build


def literal_update(W: Tensor, edited: Tensor, anchors: Tensor, retained: Tensor, K2: Tensor) -> tuple[Tensor, Tensor]:
    """The paper with columns and inverses, without augmentation: which retained keys are kept, and Delta."""
    eye = torch.eye(W.shape[1], dtype=torch.float64)
    C1, C_star = edited.mT @ edited / len(edited), anchors.mT @ edited / len(edited)
    erasing = W @ (C_star - C1) @ torch.linalg.inv(eye + C1)
    shifts = (retained @ erasing.mT).norm(dim=1)
    kept = retained[shifts > shifts.mean()]
    values, vectors = torch.linalg.eigh(kept.mT @ kept / len(kept))
    P = vectors[:, values < 1e-6] @ vectors[:, values < 1e-6].mT
    M = torch.linalg.inv(C1 @ P + eye)
    inner = torch.linalg.inv(K2.mT @ P @ M @ K2)
    return kept, W @ (C_star - C1) @ P @ (eye - M @ K2 @ inner @ K2.mT @ P) @ M


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("concept", ["dog", ["dog", "cat"]])
def test_the_edit_is_the_papers_and_nothing_else_moves(
    model: str, concept: str | list[str], speed: Build, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = speed(model=str(request.getfixturevalue(model)), concept=concept, augment=0)
    module.configure_model()
    before = weights(module)
    trainer = fit(module, EDITS[module])
    assert (trainer.current_epoch, trainer.global_step) == (1, 1)
    kept, after = next(iter(module.retained.values())), module.pipeline.named_parameters()
    assert kept.keys is not None and kept.invariants is not None
    assert len(module.edited_names) == 4
    for name, weight in before.items():
        if name not in module.edited_names:
            assert torch.equal(after[name], weight), name
            continue
        expected = literal_update(
            weight.double(), module.keys["tokens"], module.anchors["tokens"], kept.keys, kept.invariants.mT
        )
        assert module.report["layers"][name]["kept"] == len(expected[0])
        # Rounded to float32 once.
        assert_close(after[name].double(), weight.double() + expected[1], rtol=1e-6, atol=1e-6)
        assert expected[1].norm() > 1e-2 * weight.norm()


def test_what_is_kept_and_the_invariants_stay(speed: Build, fit: Fit) -> None:
    module = speed()
    fit(module, EDITS[module])
    for report in module.report["layers"].values():
        assert 0 < report["kept"] < len(RETAIN) + 1
        assert 0 < report["augmented"] < 10 * report["kept"]
        # Zero up to the rounding of float32 weights.
        assert report["kept_leak"] < 1e-6
        assert report["invariants_leak"] < 1e-6
        assert report["leak"] > 1e-3  # of the retained texts that the filter has dropped
        assert report["remaining_error"] < 1


def test_without_the_filter_all_retained_texts_stay(speed: Build, fit: Fit) -> None:
    module = speed(filter=False)
    fit(module, EDITS[module])
    for report in module.report["layers"].values():
        assert report["kept"] == len(RETAIN) + 1
        assert report["leak"] == report["kept_leak"] < 1e-6


def test_without_invariants_they_move(speed: Build, fit: Fit) -> None:
    module, constrained = speed(invariants=None), speed()
    for edited in (module, constrained):
        fit(edited, EDITS[edited])
    empty = next(iter(constrained.retained.values())).invariants
    assert empty is not None

    def moved(edited: SPEED, name: str) -> float:
        weight = edited.pretrained.values[name].double()
        change = edited.layers[name].weight.detach().double() - weight
        return float((empty @ change.mT).norm() / (empty @ weight.mT).norm())

    for name, report in module.report["layers"].items():
        assert "invariants_leak" not in report
        assert moved(module, name) > 1e-3
        assert moved(constrained, name) == pytest.approx(
            constrained.report["layers"][name]["invariants_leak"], abs=1e-7
        )


def test_the_report_says_what_the_stored_weights_do(speed: Build, fit: Fit) -> None:
    module = speed(filter=False, augment=0)
    fit(module, EDITS[module])
    kept = next(iter(module.retained.values())).keys
    assert kept is not None
    free = null_space_from_keys(kept, 1e-6, "absolute")
    assert (module.report["edited_keys"], module.report["retained_keys"]) == (1, len(RETAIN) + 1)
    for name, report in module.report["layers"].items():
        weight = module.pretrained.values[name].double()
        change = module.layers[name].weight.detach().double() - weight
        assert report["null_space_dimension"] == free.dimension == 32 - (len(RETAIN) + 1)
        assert report["relative_norm"] == pytest.approx(float(change.norm() / weight.norm()))
        assert report["keys_kept"] == pytest.approx(
            float((module.keys["tokens"] @ free.basis).norm() / module.keys["tokens"].norm())
        )
        goal = (module.anchors["tokens"] - module.keys["tokens"]) @ weight.mT
        left = goal - module.keys["tokens"] @ change.mT
        assert report["remaining_error"] == pytest.approx(float(left.norm() / goal.norm()))
    assert module.report["weight_change_ratio"] == module.pretrained.change_ratio() > 1e-2


def test_the_noise_is_that_of_the_seed(speed: Build, fit: Fit) -> None:
    def edited(**arguments: Any) -> Tensor:
        module = speed(**{"threshold": 0.05, "augment": 3, **arguments})
        torch.manual_seed(len(str(arguments)))  # the global generator has no part in it
        fit(module, EDITS[module])
        return torch.cat([layer.weight.detach().flatten() for layer in module.layers.values()])

    first = edited(seed=0)
    assert torch.equal(first, edited(seed=0))
    assert not torch.equal(first, edited(seed=11))


def test_the_edit_of_another_method_is_refused(tiny_sd: Path, pets: str) -> None:
    module = ConceptEditor("dog", model=str(tiny_sd), concept_set=pets)
    with pytest.raises(
        ValueError,
        match="writes the weights of closed-form methods, but the module is ConceptEditor",
    ):
        by_refined_null_space().setup(L.Trainer(logger=False), module, "fit")
