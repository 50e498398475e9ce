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

from helpers import by_ridge_map, weights
from lit_unlearn.core.closed_form import ridge_map_update
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.uce import UCE

Fit = Callable[..., L.Trainer]
SOLVERS = ("erase_scale", "preserve_scale", "lamb")
"""Settings of the solver; the others are the method's."""
EDITS: Any = WeakKeyDictionary()
"""The edit of each method that was built."""
Build = Callable[..., UCE]


@pytest.fixture
def uce(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``UCE`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> UCE:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        given = {**defaults, **arguments}
        settings = {name: given.pop(name) for name in SOLVERS if name in given}
        module = UCE(**given)
        EDITS[module] = by_ridge_map(**settings)
        return module

    return build


def outputs(module: UCE, keys: Tensor) -> list[Tensor]:
    """What every edited layer makes of ``keys`` (n, D), as the model is now."""
    return [keys @ layer.weight.detach().double().mT for layer in module.layers.values()]


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_every_layer_gets_the_closed_form_and_nothing_else_moves(
    model: str, uce: Build, fit: Fit, request: Any
) -> None:
    module = uce(model=str(request.getfixturevalue(model)), tokens="from_subject", lamb=0.3, erase_scale=2.0)
    module.configure_model()
    before = weights(module)
    trainer = fit(module, EDITS[module])
    assert trainer.current_epoch == 1
    with torch.no_grad():
        prompts = encode_prompts(module.pipeline.tokenizer, module.text_encoder, ["cat", ""])
    preserved = prompts.double().flatten(0, 1)
    after = module.pipeline.named_parameters()
    for name, weight in before.items():
        if name not in module.edited_names:
            assert torch.equal(after[name], weight), name
            continue
        goal = module.mapped["tokens"].guides[0] @ weight.double().mT
        expected = ridge_map_update(weight.double(), module.mapped["tokens"].keys, goal, preserved, 2.0, 1.0, 0.3)
        # Rounded to float32 once.
        assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert (after[name] - weight).norm() > 1e-2 * weight.norm()
    assert len(module.edited_names) == 8  # keys and values of the tiny model's four blocks


def test_a_phrase_comes_out_as_its_guide(uce: Build, fit: Fit) -> None:
    module = uce(preserve=None, preserve_tokens="last_subject", lamb=1e-6)
    fit(module, EDITS[module])
    with module.pretrained.restored():
        goal, before = outputs(module, module.mapped["tokens"].guides[0]), outputs(module, module.mapped["tokens"].keys)
    for now, wished, was in zip(outputs(module, module.mapped["tokens"].keys), goal, before, strict=True):
        assert (was - wished).norm() > 0.1 * wished.norm()
        assert (now - wished).norm() < 1e-4 * wished.norm()


def test_one_run_edits_several_concepts(uce: Build, fit: Fit) -> None:
    module = uce(concept=["dog", "cat"], preserve=None, preserve_tokens="last_subject", lamb=1e-6)
    fit(module, EDITS[module])
    with module.pretrained.restored():
        goal = outputs(module, module.mapped["tokens"].guides[0])
    assert len(module.mapped["tokens"].keys) == 2
    for now, wished in zip(outputs(module, module.mapped["tokens"].keys), goal, strict=True):
        assert ((now - wished).norm(dim=-1) < 1e-4 * wished.norm(dim=-1)).all()


def test_the_weights_stay_as_lambda_grows(uce: Build, fit: Fit) -> None:
    module = uce(lamb=1e12)
    fit(module, EDITS[module])
    # The smallest step of a float32 weight is 6e-8 of it.
    assert module.report["weight_change_ratio"] < 1e-7
    assert max(layer["relative_norm"] for layer in module.report["layers"].values()) < 1e-7
    strong = uce(lamb=0.5)
    fit(strong, EDITS[strong])
    assert strong.report["weight_change_ratio"] > 1e-2


def test_preserved_prompts_keep_their_outputs_as_their_scale_grows(uce: Build, fit: Fit) -> None:
    def leak(scale: float) -> tuple[float, float]:
        module = uce(preserve=["cat"], preserve_tokens="last_subject", preserve_scale=scale)
        fit(module, EDITS[module])
        with torch.no_grad():
            keys = encode_prompts(module.pipeline.tokenizer, module.text_encoder, ["cat"]).double()[:, 1]
        with module.pretrained.restored():
            before = outputs(module, keys)
        moved = [float((now - was).norm() / was.norm()) for now, was in zip(outputs(module, keys), before, strict=True)]
        layers = module.report["layers"].values()
        assert [layer["leak"] for layer in layers] == pytest.approx(moved, rel=1e-3, abs=1e-7)
        assert min(layer["relative_norm"] for layer in layers) > 1e-2
        return max(moved), max(layer["residual"] for layer in layers)

    kept, _ = leak(1e9)
    let_go, residual = leak(0.0)
    assert kept < 1e-6  # float32 weights
    assert let_go > 1e-2
    assert residual < 0.1


def test_the_report(uce: Build, fit: Fit) -> None:
    module = uce()
    trainer = fit(module, EDITS[module])
    report = module.report
    assert set(report["layers"]) == set(module.edited_names)
    assert all(layer["residual"] < layer["residual_before"] for layer in report["layers"].values())
    assert report["edited_states"] == 1
    assert report["solve_seconds"] > 0
    assert report["weight_change_ratio"] == module.pretrained.change_ratio()
    largest = max(layer["leak"] for layer in report["layers"].values())
    assert float(trainer.callback_metrics["edit/leak"]) == pytest.approx(largest)
    assert module.current_cost()["unet_forwards"] == 0


def test_half_precision_weights_are_edited(uce: Build, fit: Fit) -> None:
    module = uce(dtype="bfloat16", prompts="edit_prompts", tokens="all")
    fit(module, EDITS[module])
    for name, layer in module.layers.items():
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.isfinite().all()
        assert not torch.equal(layer.weight, module.pretrained.values[name])


def test_another_method_is_refused(tiny_sd: Path, pets: str) -> None:
    with pytest.raises(
        ValueError,
        match="writes the weights of closed-form methods, but the module is ConceptEditor",
    ):
        by_ridge_map().setup(L.Trainer(logger=False), ConceptEditor("dog", model=str(tiny_sd), concept_set=pets), "fit")
