"""Edits of models whose prompts are read earlier: what they choose, what they keep, and what guidance reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import PROMPTS, by_null_space, by_ridge_map, started
from lit_unlearn.diffusion.parameters import _LEFT_OUT, layer_index
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.context_edit import ContextEdit
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.robust_erasure import RobustErasure
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.paired_prompts import PairedPrompts
from lit_unlearn.methods.shared.text_layers import part_of
from lit_unlearn.methods.shared.text_maps import retained_inputs
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.unet_value_refinement import UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement

pytestmark = pytest.mark.filterwarnings("ignore:edited_parameters='text-fc2' leaves out:UserWarning")

Fit = Callable[..., L.Trainer]
KEPT = ["a cat", "the cat in the rain"]
FAMILIES = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture
def build(request: pytest.FixtureRequest, pets: str) -> Callable[..., Any]:
    """Makes an edit of the dog with clip skip 1; takes the class, the model's fixture and the arguments that differ."""

    def made(kind: type[DiffusionEditor], model: str = "tiny_sd", **arguments: Any) -> Any:
        folder = request.getfixturevalue(model)
        given = {"concept": "dog", "model": str(folder), "concept_set": pets, "num_inference_steps": 1, "clip_skip": 1}
        return kind(**{**given, **arguments})

    return made


def moved(module: Any, prompts: list[str], guidance_scale: float = 1.0) -> float:
    """The largest difference of the pictures of ``prompts`` from those of the unedited model."""
    draw = partial(module.pipeline.draw, prompts, [1, 2], 2, guidance_scale)
    with module.pretrained.restored():
        before = draw()
    return float((draw() - before).abs().max())


def text_edit(build: Callable[..., Any], model: str, **arguments: Any) -> Any:
    """A null-space edit of the feed-forward layers of the text encoders, by their residual streams."""
    given = {"values": "residual", "optimizer": partial(torch.optim.Adam, lr=0.01), "first_layer": 0}
    return build(ValueRefinement, model, **{**given, **arguments})


@pytest.mark.parametrize("first_layer", [0, -1])
@pytest.mark.parametrize("model", FAMILIES)
def test_the_null_space_keeps_pictures_and_moves_the_concepts(
    model: str, first_layer: int, build: Callable[..., Any], fit: Fit
) -> None:
    module = text_edit(build, model, first_layer=first_layer, retain_empty=model == "tiny_sd")
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=1e-3), steps=1)
    assert module.pipeline.clip_skip == 1
    assert moved(module, PROMPTS) > 1e-2
    assert moved(module, KEPT) < 1e-4
    assert moved(module, KEPT, 4.0) < 1e-4  # SDXL's guidance leads away from zeros


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("kind", [ContextEdit, UCE])
def test_least_squares_move_the_concept_more_than_what_is_preserved(
    kind: Any, model: str, build: Callable[..., Any], fit: Fit
) -> None:
    module = build(kind, model, edited_parameters="xattn-kv", **({"preserve": KEPT} if kind is UCE else {}))
    fit(module, by_ridge_map(lamb=0.01) if kind is UCE else by_null_space(threshold=4, rule="count"))
    concept = [name if kind is UCE else prompt for name, prompt in zip(["dog"] * 2, PROMPTS, strict=True)]
    assert moved(module, concept) > 1e-2
    assert moved(module, KEPT) < 0.5 * moved(module, concept)


@pytest.mark.parametrize("model", FAMILIES)
def test_text_layers_end_where_prompts_are_read(model: str, build: Callable[..., Any], fit: Fit) -> None:
    _LEFT_OUT.clear()  # what has been warned of
    with pytest.warns(UserWarning, match=r"layers\.2\.mlp\.fc2.*, with which no prompt is read at clip_skip=1\.$"):
        module = text_edit(build, model)
    fit(module, by_null_space(threshold=0.1, minimum=4), steps=1)
    ends: dict[str, list[tuple[int, int, int]]] = {}
    for stretch in module.stretches:
        ends.setdefault(stretch.part, []).append((stretch.read_after, len(stretch.names), len(stretch.only_end)))
    expected = {"text_encoder": [(-2, 2, 0)]}
    if model == "tiny_sdxl":  # of its 3 and 4 layers; the last two of the second act on the pooled vector alone
        expected = {"text_encoder": [(-3, 1, 0)], "text_encoder_2": [(-3, 2, 0), (-1, 2, 1)]}
    assert ends == expected
    assert not [n for n in module.edited_names if torch.equal(module.pretrained.values[n], parameter(module, n))]


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("model", [*FAMILIES, "tiny_sd3"])
def test_a_step_of_a_descent_begins_at_its_layer_and_gives_the_same(
    model: str, clip_skip: int | None, build: Callable[..., Any], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = started(text_edit(build, model, values="refined", clip_skip=clip_skip), fit)
    ran = list[str]()
    for name in module.edited_names:
        layer = module.pipeline.linear(name)
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    batch = torch.arange(module.num_pairs)

    def step(name: str) -> tuple[list[str], list[Tensor]]:
        state = module.layer_state(name)
        values = (state.initial + 0.1).requires_grad_()
        ran.clear()
        prediction, _ = module.predictions(state, values[batch], batch, 0)
        (gradient,) = torch.autograd.grad(prediction.square().sum(), values)
        return list(ran), [prediction.detach(), gradient]

    begun = {name: step(name) for name in module.edited_names}
    monkeypatch.setattr(PairedPrompts, "begun", lambda *_: nullcontext())
    for name, (run, found) in begun.items():
        whole, expected = step(name)
        text = module.paired.of_layer(name).text
        first = 0  # of a T5
        if ".layers." in name:
            count = text.model.config.num_hidden_layers
            first = min(layer_index(name), count if text.layer is None else count + 1 + text.layer)
        own = [other for other in module.edited_names if part_of(other) == part_of(name)]
        assert [other for other in whole if other not in run] == [o for o in own if layer_index(o) < first], name
        assert torch.count_nonzero(expected[1]) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def parameter(module: Any, name: str) -> Tensor:
    return module.pipeline.named_parameters()[name].detach().cpu()


def test_a_layer_that_no_prompt_is_read_with_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.fc2\.weight, with which no prompt is read at clip_skip=1"):
        build(ValueRefinement, edited_parameters=r"layers\.2\.mlp\.fc2", optimizer=torch.optim.Adam)


def test_what_is_retained_of_the_empty_prompt_is_what_guidance_reads(tiny_sd: Path) -> None:
    pipeline = Pipeline.load(tiny_sd, clip_skip=1, device="cpu")
    empty = pipeline.unconditional().states[0].double()
    for weight in (1, 3):
        kept = retained_inputs(pipeline, ["tokens"], [], weight)["tokens"]
        assert kept.moment is not None
        assert_close(kept.moment, weight * empty.mT @ empty, rtol=1e-5, atol=1e-5)
    assert (pipeline.encode([""]).states[0] - empty).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [SPEED, UNetValueRefinement, RobustErasure, ESD])
def test_methods_take_the_empty_prompt_as_guidance_reads_it(
    kind: Any, build: Callable[..., Any], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty prompt is never encoded at the layer of the prompts."""
    arguments: dict[Any, dict[str, Any]] = {
        SPEED: {},
        UNetValueRefinement: {"optimizer": partial(torch.optim.Adam, lr=0.01), "watched_prompts": 2},
        RobustErasure: {"rounds": 0, "edited_parameters": "xattn-kv"},
        ESD: {"optimizer": partial(torch.optim.SGD, lr=0.1), "num_chain_steps": 2},
    }
    seen: set[int | None] = set()

    def watched(pipeline: Any, tokens: Any) -> Any:
        empty = pipeline.tokenize([""]).ids[0].to(tokens.ids[0].device)
        if any(torch.equal(row, empty[0, : len(row)]) for row in tokens.ids[0]):
            seen.add(pipeline.clip_skip)
        return condition(pipeline, tokens)

    module = build(kind, **arguments[kind])
    condition = module.base.family.condition
    monkeypatch.setattr(module.base.family, "condition", watched)
    solvers = {UNetValueRefinement: by_null_space(threshold=0.1, minimum=4), RobustErasure: by_ridge_map(lamb=0.1)}
    fit(module, *([solvers[kind]] if kind in solvers else []))
    if kind is not ESD:
        assert seen == {None}
    else:
        assert_close(module.unconditional.states, module.pipeline.unconditional().states, rtol=0, atol=0)
