"""The direct edit of the maps that read text first: its keys, what is retained, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from helpers import KV, PROMPTS, TARGETS, by_null_space, by_refined_null_space, by_ridge_map, states
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.text_ways import way_of
from lit_unlearn.methods.context_edit import ContextEdit
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE

Build = Callable[..., ContextEdit]
Fit = Callable[..., L.Trainer]
POOLED = "transformer.time_text_embed.text_embedder.linear_1"
KEPT = ["a cat", "the cat in the rain"]
ALIGNED = [3, *range(4, 32), 31]
"""Target position of each position from 2 on: "dog" takes "ball", its target's last token, and all behind it shifts."""


@pytest.fixture
def context(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``ContextEdit`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> ContextEdit:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        return ContextEdit(**{**defaults, "edited_parameters": "xattn-kv", **arguments})

    return build


@pytest.mark.parametrize("retain_empty", [True, False])
def test_it_is_the_papers_formula_with_the_outputs_of_the_target_prompts(
    retain_empty: bool, context: Build, fit: Fit
) -> None:
    module = context(retain_empty=retain_empty)
    fit(module, by_null_space(threshold=16, rule="count", ridge=0.5))
    # All positions but the first, BOS. "the dog at sunset" has its concept at 2 as well.
    keys = states(module, *PROMPTS).double()[:, 1:].flatten(0, 1)
    goals = states(module, *TARGETS).double()[:, [1, *ALIGNED]].flatten(0, 1)
    kept, empty = states(module, *KEPT).double().flatten(0, 1), states(module, "").double()[0]
    moment = kept.mT @ kept + (len(KEPT) * empty.mT @ empty if retain_empty else 0)
    free = torch.linalg.eigh(moment).eigenvectors[:, :16]
    projector = free @ free.mT
    for name in KV:
        weight = module.pretrained.values[name].double()
        residual = (goals @ weight.mT - keys @ weight.mT).mT
        system = keys.mT @ keys @ projector + 0.5 * torch.eye(32, dtype=torch.float64)
        expected = residual @ keys @ projector @ torch.linalg.inv(system)
        assert expected.norm() > 1e-2 * weight.norm()
        # Weights are stored in float32.
        assert_close(module.layers[name].weight.double() - weight, expected, rtol=0, atol=1e-6)
        assert module.retained[name].count == len(kept) + (len(KEPT) * 32 if retain_empty else 0)
    assert module.report["edited_states"] == {"tokens": 2 * 31}


def test_only_the_last_token(context: Build, fit: Fit) -> None:
    module = context(tokens="last_subject")
    fit(module, by_null_space(threshold=16, rule="count"))
    found, goals = states(module, *PROMPTS).double(), states(module, *TARGETS).double()
    pairs = module.on_way["tokens"]
    # Rounding: the window is cut behind the last token that is read.
    assert_close(pairs.keys, torch.stack([found[0, 2], found[1, 4]]), rtol=0, atol=3e-6)
    assert_close(pairs.goals, torch.stack([goals[0, 3], goals[1, 5]]), rtol=0, atol=3e-6)


def test_states_before_the_concept_do_not_carry_it(context: Build, fit: Fit) -> None:
    module = context()
    fit(module, by_null_space(threshold=16, rule="count"))
    carrying = module.on_way["tokens"].carrying.view(2, 31)
    assert carrying.tolist() == [[False, *[True] * 30]] * 2  # "a" and "the" come before the dog


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edited_parameters": "selfattn"}, "edits only the maps that read text first"),
        ({"retain": ["a dog on grass"]}, r"model\.retain.* names the edited concept"),
        ({"concept": ["dog", "cat"]}, "leaves no prompt of pets to retain"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: dict[str, Any], message: str, context: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        context(**arguments)


# --- other families


def edit_of(kind: type, folder: Path, pets: str, **arguments: Any) -> Any:
    given = {"concept": "dog", "model": str(folder), "concept_set": pets, "num_inference_steps": 1}
    return kind(**{**given, "edited_parameters": "context", **arguments})


@pytest.mark.parametrize(
    ("family", "embedder", "count"), [("tiny_sdxl", "unet.add_embedding.linear_1", 17), ("tiny_sd3", POOLED, 2)]
)
def test_context_is_both_ways_of_the_text(
    family: str, embedder: str, count: int, pets: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = edit_of(ContextEdit, request.getfixturevalue(family), pets)
    fit(module, by_null_space(threshold=8, rule="count", ridge=1e-3))
    assert len(module.edited_names) == count
    assert f"{embedder}.weight" in module.edited_names
    assert set(module.on_way) == {"tokens", "pooled"}
    keys = module.on_way["pooled"]
    with torch.no_grad():
        condition = module.pipeline.encode(PROMPTS)
    # Rounding: edit and target prompts are encoded in one batch.
    assert_close(keys.keys[:, : condition.pooled.shape[1]], condition.pooled.double(), rtol=0, atol=3e-6)
    for name, layer in module.layers.items():  # biases stay, and every map is changed
        change = layer.weight.detach() - module.pretrained.values[name]
        assert change.norm() > 1e-3 * layer.weight.norm()


def test_the_states_of_all_encoders_are_read_and_aligned(tiny_sd3: Path, pets: str, fit: Fit) -> None:
    module = edit_of(ContextEdit, tiny_sd3, pets)
    fit(module, by_null_space(threshold=8, rule="count"))
    clip, t5 = (module.pipeline.texts[number].length for number in (0, 2))
    with torch.no_grad():
        edited, targets = (module.pipeline.encode(prompts).states.double() for prompts in (PROMPTS, TARGETS))
    pairs = module.on_way["tokens"]
    assert len(pairs.keys) == 2 * (clip - 1 + t5)
    # The CLIPs' positions of both prompts come first, without BOS, then the T5's, which has none.
    assert_close(pairs.keys[: clip - 1], edited[0, 1:clip], rtol=0, atol=1e-5)
    assert_close(pairs.keys[2 * (clip - 1) :][:t5], edited[0, clip:], rtol=0, atol=1e-5)
    words = pairs.goals[2 * (clip - 1) :][:4]  # the four pieces of "a dog </s>" take those of "a soccer ball </s>"
    assert_close(words, targets[0, [clip, clip + 1, clip + 3, clip + 4]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3", "tiny_sd3_without_t5"])
def test_what_reads_a_retained_prompt_stays_and_the_concept_changes(
    family: str, pets: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    # The states of these prompts fill the space of such small models, so only the pooled way has a null space.
    pattern = "add_embedding.linear_1.weight|text_embedder.linear_1.weight"
    module = edit_of(ContextEdit, request.getfixturevalue(family), pets, edited_parameters=pattern)
    fit(module, by_null_space(threshold=1e-9, rule="mean", ridge=1e-9))
    (layer,) = module.layers.values()
    before = module.pretrained.values[module.edited_names[0]]
    with torch.no_grad():
        kept, edited = (
            module.pipeline.first_inputs(module.pipeline.encode(prompts))["pooled"][:, 0] for prompts in (KEPT, PROMPTS)
        )
    change = layer.weight.detach() - before
    moment = module.retained[module.edited_names[0]].moment
    assert torch.linalg.matrix_rank(moment) == 3 < layer.in_features  # two prompts, and the empty one
    assert (kept @ change.mT).abs().max() < 1e-5 * (kept @ before.mT).abs().max()
    assert (edited @ change.mT).norm() > 1e-2 * (edited @ before.mT).norm()


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3"])
def test_uce_takes_targets_without_the_bias(family: str, pets: str, fit: Fit, request: pytest.FixtureRequest) -> None:
    module = edit_of(UCE, request.getfixturevalue(family), pets, preserve=None)
    fit(module, by_ridge_map(lamb=1e-6))
    name = next(name for name in module.edited_names if module.layers[name].bias is not None)
    layer, (mapped, *_) = module.layers[name], [module.mapped["pooled" if "linear_1" in name else "tokens"]]
    before = mapped.guides[0] @ module.pretrained.values[name].double().mT + layer.bias.double()
    with torch.no_grad():
        assert_close(layer(mapped.keys.float()).double(), before, rtol=1e-3, atol=1e-4)  # what the guide had


# --- a family with a projection of the text, and cross-attention behind it


def largest_move(module: Any, prompts: list[str]) -> float:
    """The largest difference of a pixel of ``prompts`` from the unedited model, with guidance."""
    with torch.no_grad():
        edited = module.pipeline.draw(prompts, [1, 2], 2, 4.5)
        with module.pretrained.restored():
            return float((module.pipeline.draw(prompts, [1, 2], 2, 4.5) - edited).abs().max())


PROJECTED = r"attn2\.to_[kv]\.weight"
WRITTEN_BY = {
    ContextEdit: by_null_space(threshold=1e-9, rule="max", ridge=1e-6),
    UCE: by_ridge_map(lamb=1e-3),
    SPEED: by_refined_null_space(),
}


@pytest.mark.parametrize(("pattern", "way", "count"), [("context", "tokens", 1), ("xattn-kv", "projected", 4)])
@pytest.mark.parametrize("kind", WRITTEN_BY)
def test_projection_and_cross_attention_are_edited_alike(
    kind: Any, pattern: str, way: str, count: int, pets: str, tiny_pixart: Path, fit: Fit
) -> None:
    module = edit_of(kind, tiny_pixart, pets, edited_parameters=pattern)
    fit(module, WRITTEN_BY[kind])
    assert len(module.edited_names) == count
    assert {way_of(name) for name in module.edited_names} == {way}
    assert largest_move(module, PROMPTS) > 1e-2
    if kind is ContextEdit:  # few positions are read, so that retained prompts leave something free
        assert largest_move(module, KEPT) < 1e-4
        read = sum(len(ids) for ids in module.pipeline.tokenizer(PROMPTS).input_ids)
        assert module.report["edited_states"] == {way: read}


@pytest.mark.parametrize("kind", WRITTEN_BY)
def test_maps_of_which_one_feeds_the_other_are_not_edited_at_once(
    kind: Any, pets: str, tiny_pixart: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("a model was loaded"))
    both = rf"caption_projection\.linear_1\.weight|{PROJECTED}"
    with pytest.raises(ValueError, match=r"selects transformer\.caption_projection.* moves what .*attn2\.to_k\.weight"):
        edit_of(kind, tiny_pixart, pets, edited_parameters=both)
    with pytest.raises(ValueError, match="edits only the maps that read text first"):
        edit_of(kind, tiny_sd3, pets, edited_parameters=PROJECTED)  # its attn2 is between parts of the picture
