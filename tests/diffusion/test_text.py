"""A text encoder with its tokenizer says what the functions say that take the two apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import load_copy
from lit_unlearn.data.names import find_names
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.new_tokens import initial_embeddings
from lit_unlearn.diffusion.prompts import tokenize
from lit_unlearn.diffusion.text import TextEncoder, Tokens, linear_layers

PROMPTS = ["a dog at sunset", "soccer ball", ""]
LENGTH, WIDTH = 32, 32


@pytest.fixture(params=["tiny_sd", "tiny_sd2"])
def any_pipeline(request: pytest.FixtureRequest) -> StableDiffusion:
    return load_copy(str(request.getfixturevalue(request.param)))


@pytest.fixture
def text(any_pipeline: StableDiffusion) -> TextEncoder:
    return any_pipeline.texts[0]


# --- prompts as they are read


def tokens(slots: bool) -> Tokens:
    """Four rows as two encoders read them, the second with numbers of its own; with slots or without."""
    first = torch.arange(12).view(4, 3)
    return Tokens((first, first + 100), (first % 2 - 1, first % 3 - 1) if slots else ())


@pytest.mark.parametrize("slots", [False, True], ids=["plain", "slots"])
@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([3]), torch.tensor([True, False, False, True])])
def test_rows_of_all_encoders_are_taken_together(slots: bool, rows: slice | list[int] | torch.Tensor) -> None:
    given = tokens(slots)
    assert len(given) == 4
    found = given[rows]
    for taken, whole in ((found.ids, given.ids), (found.slots, given.slots)):
        assert len(taken) == len(whole)
        assert all(torch.equal(part, tensor[rows]) for part, tensor in zip(taken, whole, strict=True))


@pytest.mark.parametrize("slots", [False, True], ids=["plain", "slots"])
def test_parts_hold_every_row_once_and_in_order(slots: bool) -> None:
    given = tokens(slots)
    parts = list(given.split(3))
    assert [len(part) for part in parts] == [3, 1]
    for which in range(2):
        assert torch.equal(torch.cat([part.ids[which] for part in parts]), given.ids[which])
    assert all(len(part.slots) == len(given.slots) for part in parts)
    assert [len(part) for part in given.split(10)] == [4]


# --- the encoder


def test_it_knows_its_length_its_end_and_its_table(any_pipeline: StableDiffusion, text: TextEncoder) -> None:
    assert (text.part, text.model, text.tokenizer) == (
        "text_encoder",
        any_pipeline.text_encoder,
        any_pipeline.tokenizer,
    )
    assert text.length == LENGTH
    ids = text.tokenize(PROMPTS)
    assert torch.equal(ids, tokenize(any_pipeline.tokenizer, PROMPTS))
    assert all(text.eos in row for row in ids.tolist())
    name = "text_encoder.embeddings.token_embedding.weight"
    assert text.table is any_pipeline.named_parameters()[name]


def test_states_are_the_models_last_and_the_stream_is_before_its_norm(text: TextEncoder) -> None:
    ids = text.tokenize(PROMPTS)
    output = text.model(ids, output_hidden_states=True)
    assert torch.equal(text.states(ids), output.last_hidden_state)
    assert text.states(ids).shape == (len(PROMPTS), LENGTH, WIDTH)
    # The first of the hidden states are the embeddings, so those behind layer i have the number i + 1.
    for layer, number in ((0, 1), (1, 2), (-1, 3)):
        assert torch.equal(text.stream(ids, layer), output.hidden_states[number].float())
    assert torch.equal(text.stream(ids), text.stream(ids, 2))
    assert not torch.isclose(text.stream(ids, 0), text.stream(ids, 1)).all()


def test_words_are_the_tokens_between_the_ends(text: TextEncoder) -> None:
    row = text.tokenize(["soccer ball"])[0].tolist()
    words = text.words("soccer ball")
    assert row[1 : 1 + len(words)] == words
    assert row[1 + len(words)] == text.eos
    assert text.names_of(words) == ["soccer</w>", "ball</w>"]


def test_learned_tokens_stand_in_for_words_while_the_block_lasts(text: TextEncoder) -> None:
    ids, slots = text.tokenize_templates(["a {} at sunset", "a cat"], 2)
    own = text.initial_embeddings(2, "soccer ball", torch.Generator())
    assert torch.equal(own, text.table.detach()[text.words("soccer ball")])
    words = text.states(text.tokenize(["a soccer ball at sunset", "a cat"]))
    before = text.states(ids)
    with text.learned(own, slots):
        assert torch.equal(text.states(ids), words)
    assert torch.equal(text.states(ids), before)
    assert not torch.equal(before[0], words[0])


def test_noise_to_start_from_is_like_the_vocabulary(text: TextEncoder) -> None:
    squares = text.table.detach().square().sum(dim=1)
    assert text.vocabulary_norm == pytest.approx(float(squares.sqrt().mean()), rel=1e-6)
    start = text.initial_embeddings(500, None, torch.Generator().manual_seed(0))
    # 16k numbers: their spread is known to a hundredth.
    assert float(start.square().sum(dim=1).mean()) == pytest.approx(float(squares.mean()), rel=0.05)
    expected = initial_embeddings(text.tokenizer, text.model, 500, None, torch.Generator().manual_seed(0))
    assert torch.equal(start, expected)


def test_names_are_found(text: TextEncoder) -> None:
    prompts = ["a soccer ball at sunset", "a dog"]
    mask = text.names_mask(prompts, lambda prompt: find_names(prompt, ["soccer ball"]))
    assert mask.nonzero().tolist() == [[0, 2], [0, 3]]


def test_layers_are_found_by_how_their_names_end() -> None:
    model = nn.Sequential()
    for name in ("first", "second"):
        model.add_module(
            name, nn.ModuleDict({"to_k": nn.Linear(2, 2), "to_q": nn.Linear(2, 2), "to_v": nn.Linear(2, 2)})
        )
    expected = [model.first["to_k"], model.first["to_v"], model.second["to_k"], model.second["to_v"]]
    found = linear_layers(model, ("to_k", "to_v"))
    assert len(found) == 4
    assert all(one is other for one, other in zip(found, expected, strict=True))
    assert linear_layers(model, ("absent",)) == []
