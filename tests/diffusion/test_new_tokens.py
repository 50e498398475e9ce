from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import load_copy
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.new_tokens import (
    initial_embeddings,
    read_embeddings,
    substitute_embeddings,
    tokenize_templates,
    vocabulary_norm,
)
from lit_unlearn.diffusion.prompts import encode, tokenize
from lit_unlearn.diffusion.vocabulary import vocabulary_of

TEMPLATES = ["a photo of {}", "{} at sunset and {}", "a cat"]
FILLED = ["a photo of soccer ball", "soccer ball at sunset and soccer ball", "a cat"]


@pytest.fixture(params=["tiny_sd", "tiny_sd2"])
def any_components(request: pytest.FixtureRequest) -> StableDiffusion:
    return load_copy(str(request.getfixturevalue(request.param)))


def test_templates_are_tokenized_as_prompts_are(any_components: StableDiffusion) -> None:
    tokenizer = any_components.tokenizer
    words = tokenizer("soccer ball", add_special_tokens=False).input_ids
    assert len(words) == 2
    ids, slots = tokenize_templates(tokenizer, TEMPLATES, 2)
    filled = torch.where(slots >= 0, torch.tensor(words)[slots.clamp_min(0)], ids)
    assert torch.equal(filled, tokenize(tokenizer, FILLED))
    assert (slots >= 0).sum(-1).tolist() == [2, 4, 0]
    assert slots[1].tolist()[:8] == [-1, 0, 1, -1, -1, -1, 0, 1]


def test_known_embeddings_in_new_tokens_give_the_states_of_the_words(any_components: StableDiffusion) -> None:
    tokenizer, text_encoder = any_components.tokenizer, any_components.text_encoder
    own = initial_embeddings(tokenizer, text_encoder, 2, "soccer ball", torch.Generator())
    ids, slots = tokenize_templates(tokenizer, TEMPLATES, 2)
    with substitute_embeddings(text_encoder, own, slots):
        states = encode(text_encoder, ids)
    assert torch.equal(states, encode(text_encoder, tokenize(tokenizer, FILLED)))
    # And without them it would be other states, but for the prompt that has none.
    plain = encode(text_encoder, ids)
    assert [torch.equal(states[row], plain[row]) for row in range(3)] == [False, False, True]


def test_gradients_reach_the_new_tokens_only(components: StableDiffusion) -> None:
    text_encoder = components.text_encoder
    embeddings = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    ids, slots = tokenize_templates(components.tokenizer, ["a photo of {}"], 2)  # the third stands nowhere
    with pytest.raises(KeyError), substitute_embeddings(text_encoder, embeddings, slots):
        encode(text_encoder, ids)[0, 5:].sum().backward()
        raise KeyError
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(1) > 0).tolist() == [True, True, False]
    assert all(parameter.grad is None for parameter in text_encoder.parameters())
    assert not text_encoder.get_input_embeddings()._forward_hooks


def test_a_prompt_that_is_too_long(components: StableDiffusion) -> None:
    tokenize_templates(components.tokenizer, ["a {}"], 29)
    with pytest.raises(ValueError, match=r"'a \{\}' has 33 tokens with 30 new ones .* reads 32: shorten it"):
        tokenize_templates(components.tokenizer, ["a {}"], 30)


def test_where_new_tokens_start(components: StableDiffusion) -> None:
    tokenizer, text_encoder = components.tokenizer, components.text_encoder
    table = text_encoder.get_input_embeddings().weight.detach()
    soccer, ball = tokenizer("soccer ball", add_special_tokens=False).input_ids
    words = initial_embeddings(tokenizer, text_encoder, 3, "soccer ball", torch.Generator())
    assert torch.equal(words, table[[soccer, ball, soccer]])
    generator = torch.Generator().manual_seed(1)
    noise = initial_embeddings(tokenizer, text_encoder, 4000, None, generator)
    # 4,000 draws in each of 32 dimensions: means within five standard errors.
    assert (noise.mean(0) - table.mean(0)).abs().max() < 5 * table.std(0).max() / 4000**0.5
    assert (noise.std(0) / table.std(0) - 1).abs().max() < 0.06
    assert vocabulary_norm(text_encoder) == pytest.approx(float(table.norm(dim=1).mean()))


def test_a_vocabulary_is_told_from_another(
    tiny_sd: Path, tiny_sd2: Path, tiny_sd_2022: Path, broken_model: Callable[..., Path]
) -> None:
    first, width = vocabulary_of(str(tiny_sd))
    assert width == 32
    assert vocabulary_of(str(tiny_sd_2022)) == (first, 32)  # the same weights by older names
    assert vocabulary_of(str(tiny_sd2))[0] != first
    assert vocabulary_of("CompVis/stable-diffusion-v1-4") == ("CompVis/stable-diffusion-v1-4", None)

    def without_table(folder: Path) -> None:
        save_file({"final_layer_norm.bias": torch.zeros(32)}, folder / "text_encoder/model.safetensors")

    with pytest.raises(ValueError, match=r"has no token_embedding.weight in text_encoder/: copy it again"):
        vocabulary_of(str(broken_model(without_table)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist: `lit-unlearn fit --config textual_inversion` makes one"),
        (b"no safetensors at all", "is corrupt or no safetensors"),
        ({"embeddings": torch.zeros(2, 3)}, "was not made by textual_inversion.yaml: it lacks"),
        ({"emb_params": torch.zeros(2, 3)}, "was not made by textual_inversion.yaml: it lacks"),
    ],
)
def test_files_that_hold_no_embeddings(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "embeddings.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(ValueError, match=f"embeddings={path} {problem}"):
        read_embeddings(path)
