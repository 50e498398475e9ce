from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.testing import assert_close

from helpers import CONFIGS, by_refined_null_space, started, states
from lit_unlearn.core.null_space import EmptyNullSpaceError
from lit_unlearn.core.solvers import Retained
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.prompts import tokenize
from lit_unlearn.methods.speed import SPEED

Fit = Callable[..., L.Trainer]
Build = Callable[..., SPEED]
LENGTH = 32
CUT = 3e-6
"""Largest difference of a state from that of the whole window."""


@pytest.fixture
def speed(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``SPEED`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> SPEED:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        return SPEED(**{**defaults, **arguments})

    return build


def kept(module: SPEED) -> Retained:
    """What all layers of ``module`` retain."""
    (own,) = set(module.retained.values())
    return own


# --- which texts


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ({}, [("dog", "soccer ball")]),
        ({"towards": "anchor"}, [("dog", "a toy")]),
        ({"towards": "empty"}, [("dog", "")]),
        (
            {"prompts": "edit_prompts"},
            [("a dog", "a soccer ball"), ("the dog at sunset", "the soccer ball at sunset")],
        ),
        ({"prompts": "edit_prompts", "towards": "anchor"}, [("a dog", "a toy"), ("the dog at sunset", "a toy")]),
        ({"concept": ["dog", "cat"], "retain": ["an owl"]}, [("dog", "soccer ball"), ("cat", "parrot")]),
    ],
)
def test_texts_and_their_anchors(arguments: dict[str, Any], pairs: list[tuple[str, str]], speed: Build) -> None:
    module = speed(**arguments)
    assert list(zip(module.edited_texts, module.anchor_texts, strict=True)) == pairs


@pytest.mark.parametrize(
    ("arguments", "retained"),
    [
        ({}, ["cat"]),
        ({"retain": ["an owl", "cat"]}, ["cat", "an owl"]),
        ({"prompts": "edit_prompts"}, ["a cat", "the cat in the rain"]),
        ({"prompts": "edit_prompts", "retain": ["an owl"]}, ["a cat", "the cat in the rain", "an owl"]),
        ({"concept": ["dog", "cat"], "retain": ["an owl"]}, ["an owl"]),
    ],
)
def test_retained_texts_are_those_of_other_concepts(
    arguments: dict[str, Any], retained: list[str], speed: Build
) -> None:
    assert speed(**arguments).retained_texts == retained


def test_every_name_counts_but_those_that_name_an_edited_concept(speed: Build) -> None:
    module = speed(concept="soccer ball", concept_set="emoji20")
    assert module.edited_texts == ["soccer ball", "soccer", "football"]
    assert module.anchor_texts == ["basketball"] * 3
    assert {"pixel art", "pixel", "raining", "dog"} <= set(module.retained_texts)
    assert len(module.retained_texts) == len(set(module.retained_texts)) == 19 + 3


# --- which states


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_keys_are_states_of_the_last_token_of_the_name(
    model: str, speed: Build, fit: Fit, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(model))
    module = started(speed(model=path, concept="cat", retain=["the soccer ball"]), fit)
    ids = tokenize(module.pipeline.tokenizer, ["the soccer ball"])[0].tolist()
    assert ids[4] == module.pipeline.tokenizer.eos_token_id
    # The window is cut behind the last token that is read, so float32 states differ by rounding.
    assert_close(module.keys["tokens"], states(module, "cat").double()[:, 1], rtol=0, atol=CUT)
    assert_close(module.anchors["tokens"], states(module, "parrot").double()[:, 1], rtol=0, atol=CUT)
    rows = torch.cat([states(module, "dog").double()[:, 1], states(module, "the soccer ball").double()[:, 3]])
    assert_close(kept(module).keys, rows, rtol=0, atol=CUT)
    assert_close(kept(module).moment, kept(module).keys.mT @ kept(module).keys)
    assert kept(module).largest_norm == pytest.approx(float(rows.norm(dim=1).max()), rel=1e-6)
    assert (kept(module).count, kept(module).prompts) == (2, 2)
    (writes,) = module.writes(0)
    assert {write.texts for write in writes} == {1}
    assert module.keys["tokens"].dtype == torch.float64


def test_the_empty_anchor_is_the_start_of_text(speed: Build, fit: Fit) -> None:
    module = started(speed(towards="empty"), fit)
    assert_close(module.anchors["tokens"], states(module, "").double()[:, 0], rtol=0, atol=CUT)


def test_all_tokens_are_aligned_with_the_anchors(speed: Build, fit: Fit) -> None:
    module = started(speed(prompts="edit_prompts", tokens="all"), fit)
    assert_close(module.keys["tokens"], states(module, *module.edited_texts).double()[:, 1:].flatten(0, 1))
    # "dog" takes "ball", the last of its anchor's two tokens, and all behind it shifts by one.
    places = [1, 3, *range(4, LENGTH), LENGTH - 1]
    assert_close(module.anchors["tokens"], states(module, *module.anchor_texts).double()[:, places].flatten(0, 1))
    assert_close(kept(module).keys, states(module, *module.retained_texts).double()[:, 1:].flatten(0, 1))
    (writes,) = module.writes(0)
    assert {write.texts for write in writes} == {2}


@pytest.mark.parametrize(("invariants", "count"), [(None, None), (0, 1), (3, 4)])
def test_invariants_are_start_of_text_and_centres_of_the_padding(
    invariants: int | None, count: int | None, speed: Build, fit: Fit
) -> None:
    module = started(speed(invariants=invariants), fit)
    rows = kept(module).invariants
    if rows is None:
        assert count is None
        return
    assert len(rows) == count
    empty = states(module, "").double()[0]
    assert torch.equal(rows[0], empty[0])
    if count == 4:
        nearest = torch.cdist(empty[1:], rows[1:]).argmin(1)
        assert len(set(nearest.tolist())) == 3
        for place, centre in enumerate(rows[1:]):
            assert_close(centre, empty[1:][nearest == place].mean(0))


# --- what is refused before anything is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"invariants": -1}, r"model\.invariants=-1 must be zero or larger"),
        (
            {"retain": ["a cat", "my Dog"]},
            r"model\.retain has 'my Dog', which names the edited concept 'dog' \('Dog'\)",
        ),
        ({"concept": ["dog", "cat"]}, r"concept=dog, cat leaves no text of pets to retain: .* model\.retain"),
        ({"edited_parameters": "selfattn"}, r"edits only the maps that read text first"),
        ({"edited_parameters": "nothing"}, r"edited_parameters='nothing' selects no parameter"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: dict[str, Any], message: str, speed: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        speed(**arguments)


def test_a_threshold_that_frees_nothing_leaves_the_weights_alone(speed: Build, fit: Fit) -> None:
    # 285 edit prompts at 31 positions use all 32 inputs but the sum, which the encoder's last norm makes zero.
    module = speed(concept_set="emoji20", prompts="edit_prompts", tokens="all")
    module.configure_model()
    with torch.no_grad():
        module.text_encoder.final_layer_norm.bias.copy_(torch.linspace(-1, 2, 32).square())
    with pytest.raises(EmptyNullSpaceError, match=r"rule='absolute' with threshold=1e-09"):
        fit(module, by_refined_null_space(filter=False, augment=0, threshold=1e-9))
    assert module.pretrained.change_ratio() == 0


# --- recipes


@pytest.mark.parametrize("name", ["speed.yaml", "speed_paper.yaml"])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "emoji-sd"])
def test_a_recipe_edits_values_only(name: str, model: str, fit: Fit, request: pytest.FixtureRequest) -> None:
    recipe = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    arguments, settings = recipe["model"]["init_args"], recipe["edit"]["init_args"]
    assert recipe["edit"]["class_path"] == "RefinedNullSpace"
    if model == "emoji-sd":
        module = SPEED(concept="dog", **arguments)
    else:
        # A random encoder of 32 states has no null space of 200 prompts, so its size is given.
        settings |= {"threshold": 1e-12, "minimum": 8}
        module = SPEED(concept="dog", **{**arguments, "model": str(request.getfixturevalue(model))})
    fit(module, by_refined_null_space(**settings))
    assert module.edited_names
    assert all(name.endswith("attn2.to_v.weight") for name in module.edited_names)
    parameters = module.pipeline.named_parameters()
    for edited in module.edited_names:
        assert not torch.equal(parameters[edited], module.pretrained.values[edited])
    assert 0 < module.report["weight_change_ratio"] < 2
