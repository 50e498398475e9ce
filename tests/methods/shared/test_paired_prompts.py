"""Prompt pairs in the text encoders: tokens, inputs of edited layers, and what is read once for all rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import LAYERS, PROMPTS, TARGETS
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.parameters import layer_index
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import tokenize
from lit_unlearn.methods.shared.paired_prompts import PairedPrompts

ALIGNMENT = [0, 1, 3, *range(4, 32), 31]
"""Target position of each edit position: "dog" takes "ball", the last token of its target, and all behind it shifts."""


@pytest.fixture
def pipeline(tiny_sd: Path) -> Pipeline:
    return load_pipeline(str(tiny_sd))


def paired(pipeline: Pipeline, names: list[str] = LAYERS, several_rounds: bool = True) -> PairedPrompts:
    device = torch.device("cpu")
    return PairedPrompts(pipeline, PROMPTS, TARGETS, "no_bos", pipeline.sites(names), several_rounds, device)


@torch.no_grad()
def inputs(pipeline: Pipeline, name: str, prompts: list[str]) -> Tensor:
    """What the layer ``name`` reads, seen by a hook of our own."""
    seen: list[Tensor] = []
    handle = pipeline.linear(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipeline.texts[0].model(tokenize(pipeline.tokenizer, prompts))  # type: ignore[attr-defined]
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_keys_are_the_layers_inputs(name: str, pipeline: Pipeline) -> None:
    pairs = paired(pipeline)
    keys, goals = inputs(pipeline, name, PROMPTS), inputs(pipeline, name, TARGETS)
    state = pairs.state(name, only_end=False)
    assert torch.equal(state.keys, keys) and torch.equal(state.initial, keys @ state.layer.weight.mT)
    assert state.mask.tolist() == [[False, *[True] * 31]] * 2 and state.weight == 1
    assert torch.equal(pairs.target_keys(name), goals[:, ALIGNMENT])


@torch.no_grad()
def test_where_only_the_end_acts_it_counts_as_a_whole_text(pipeline: Pipeline) -> None:
    state = paired(pipeline).state(LAYERS[-1], only_end=True)
    # "a dog" and "the dog at sunset" end behind BOS and two or four tokens.
    assert state.mask.nonzero().tolist() == [[0, 3], [1, 5]] and state.weight == 32
    assert len(state.edited_keys) == 2 * 32


@torch.no_grad()
@pytest.mark.parametrize("several_rounds", [True, False])  # with several, the first layer's keys are kept
@pytest.mark.parametrize("name", LAYERS)
def test_the_stream_is_read_in_the_pass_of_the_keys(
    name: str, several_rounds: bool, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.methods.shared.text_layers.ENCODE_BATCH", 1)
    pairs = paired(pipeline, several_rounds=several_rounds)
    text, passes = pairs.first.text, [0]
    expected = text.stream(pairs.first.edit_ids, 1)
    text.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    state = pairs.state(name, only_end=False, stream_after=1)
    assert passes == [2]  # prompts one by one
    again = pairs.state(name, only_end=False, stream_after=1)
    assert passes == [3 if pairs.keeps(name) else 4]  # beside kept keys, the stream alone, of both at once
    for found in (state.stream, again.stream):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, in batches of another size
    assert torch.equal(state.keys, pairs.keys(name, pairs.first.edit_ids))
    assert pairs.state(name, only_end=False).stream is None


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_descent_begins_at_its_layer(name: str, pipeline: Pipeline) -> None:
    pairs = paired(pipeline, several_rounds=False)
    state, text = pairs.state(name, only_end=False, with_before=True), pairs.first.text
    layers = list(text.model.get_submodule("encoder.layers"))
    ran = list[int]()
    handles = [layer.mlp.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    chosen = torch.tensor([1, 0, 1])
    expected = text.read(pairs.first.edit_ids[chosen])
    ran.clear()
    with pairs.begun(state, chosen):
        found = text.read(pairs.first.edit_ids[chosen])
    assert ran == list(range(layer_index(name), 3))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # float32, in a batch of another size
    for handle in handles:
        handle.remove()
    assert list(text.model.get_submodule("encoder.layers")) == layers
    assert torch.equal(text.read(pairs.first.edit_ids[chosen])[0], expected[0])
    with pairs.begun(pairs.state(name, only_end=False), chosen):  # its states are not known
        assert torch.equal(text.read(pairs.first.edit_ids[chosen])[0], expected[0])
    pairs = paired(pipeline, several_rounds=True)
    first = pairs.state(name, only_end=False, with_before=True).before
    for edited in LAYERS:
        pairs.layers[edited].weight.mul_(1.5)
    second = pairs.state(name, only_end=False, with_before=True).before
    fresh = paired(pipeline, several_rounds=False).state(name, only_end=False, with_before=True).before
    assert first is not None and second is not None and fresh is not None and torch.equal(second, fresh)
    assert (first is second) is pairs.keeps(name) is torch.equal(first, second)


@torch.no_grad()
def test_a_t5_runs_from_its_first_layer(tiny_sd3: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd3))
    name = [
        n
        for n in pipeline.named_parameters()
        if n.startswith("text_encoder_3.") and n.endswith("DenseReluDense.wo.weight")
    ][-1]
    pairs = paired(pipeline, [name])
    state = pairs.state(name, only_end=False, with_before=True)
    assert state.before is None
    ids = pairs.of_layer(name).edit_ids
    expected = pairs.of_layer(name).text.states(ids)
    with pairs.begun(state, torch.arange(2)):
        assert torch.equal(pairs.of_layer(name).text.states(ids), expected)


@torch.no_grad()
def test_what_does_not_fit_is_not_kept(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    both = 2 * 32 * (128 + 32) * 4  # of two texts, keys and what the layer's block reads
    for most, kept in ((both, 1), (both - 1, 0)):
        monkeypatch.setattr("lit_unlearn.methods.shared.layer_state.MOST_KEPT_BYTES", most)
        pairs = paired(pipeline)
        pairs.state(LAYERS[0], only_end=False, stream_after=1, with_before=True)
        assert [len(own) for own in pairs.kept.found.values()] == [kept]
        assert all(known.stream is None for own in pairs.kept.found.values() for _, known in own)


@torch.no_grad()
def test_only_what_no_edit_moves_is_kept_and_only_for_further_rounds(pipeline: Pipeline) -> None:
    pairs = paired(pipeline)
    once = paired(pipeline, several_rounds=False)
    first = {name: pairs.keys(name, pairs.first.edit_ids) for name in LAYERS}
    assert pairs.keys(LAYERS[0], pairs.first.edit_ids) is first[LAYERS[0]]
    assert pairs.keys(LAYERS[1], pairs.first.edit_ids) is not first[LAYERS[1]]
    assert once.keys(LAYERS[0], pairs.first.edit_ids) is not once.keys(LAYERS[0], pairs.first.edit_ids)
    pairs.forget()
    again = pairs.keys(LAYERS[0], pairs.first.edit_ids)
    assert again is not first[LAYERS[0]] and torch.equal(again, first[LAYERS[0]])


def test_the_other_edited_encoders_read_the_target_meanwhile(tiny_sd3: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd3))
    every = pipeline.named_parameters()
    last = {
        part: [name for name in every if name.startswith(f"{part}.") and name.endswith(end)][-1]
        for part, end in {"text_encoder_2": "mlp.fc2.weight", "text_encoder_3": "DenseReluDense.wo.weight"}.items()
    }
    pairs = paired(pipeline, list(last.values()))
    edited, targets = pairs.edit_tokens.ids, pairs.target_tokens.ids
    # text_encoder is not edited at all.
    for name, wanted in (
        (last["text_encoder_2"], (edited[0], edited[1], targets[2])),
        (last["text_encoder_3"], (edited[0], targets[1], edited[2])),
    ):
        assert [torch.equal(*ids) for ids in zip(pairs.tokens_read(name).ids, wanted, strict=True)] == [True] * 3
    assert not any(torch.equal(*ids) for ids in zip(edited, targets, strict=True))
