from __future__ import annotations

import pytest
import torch
from tiny_families import t5_tokenizer
from torch.testing import assert_close

from lit_unlearn.diffusion.discrete_prompts import whole_words, words_of
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.prompts import encode_prompts, token_ids


def test_any_words_are_read_as_the_tokens_they_are(components: StableDiffusion) -> None:
    tokenizer = components.tokenizer
    allowed = whole_words(tokenizer)
    assert 500 < len(allowed) < len(tokenizer)
    assert not set(allowed.tolist()) & set(tokenizer.all_special_ids)
    rows = torch.randint(len(allowed), (50, 8), generator=torch.Generator().manual_seed(0))
    for ids in allowed[rows].tolist():
        assert tokenizer(words_of(tokenizer, ids), add_special_tokens=False).input_ids == ids
    # Parts of words would be read as something else.
    parts = [number for token, number in tokenizer.get_vocab().items() if not token.endswith("</w>")]
    assert parts
    assert not set(parts) & set(allowed.tolist())


def test_what_is_left_out(components: StableDiffusion) -> None:
    tokenizer = components.tokenizer
    allowed = whole_words(tokenizer, lambda word: word == "cat", ["soccer ball"])
    missing = set(whole_words(tokenizer).tolist()) - set(allowed.tolist())
    assert sorted(tokenizer.convert_ids_to_tokens(sorted(missing))) == ["ball</w>", "cat</w>", "soccer</w>"]
    with pytest.raises(ValueError, match="no token that is a whole word"):
        whole_words(tokenizer, lambda word: True)


def test_a_mixture_of_one_token_is_that_token(components: StableDiffusion) -> None:
    tokenizer, text_encoder = components.tokenizer, components.text_encoder
    allowed = whole_words(tokenizer)
    ids = tokenizer("dog castle", add_special_tokens=False).input_ids
    weights = (allowed == torch.tensor(ids)[:, None]).float().requires_grad_()
    prompts = components.tokenize_templates(["{} in the rain", "a {}"], 2)
    states = components.encode_mixtures(weights, allowed[:, None], prompts).states
    texts = ["dog castle in the rain", "a dog castle"]
    assert_close(states, encode_prompts(tokenizer, text_encoder, texts))
    other = encode_prompts(tokenizer, text_encoder, ["castle dog in the rain", "a castle dog"])
    assert not torch.isclose(states, other).all(-1).all(-1).any()
    (gradient,) = torch.autograd.grad(states.square().sum(), [weights])
    assert gradient.shape == weights.shape
    assert gradient.abs().min() > 0
    assert all(parameter.grad is None for parameter in text_encoder.parameters())


def test_words_of_a_unigram_tokenizer() -> None:
    tokenizer = t5_tokenizer()
    found = whole_words(tokenizer, lambda word: word == "cat", ["dog"])
    words = [words_of(tokenizer, [number]) for number in found.tolist()]
    assert "owl" in words and not {"cat", "dog", "", "a b"} & set(words) and len(words) > 50
    chosen = found[torch.tensor([5, 0, 9])].tolist()
    assert token_ids(tokenizer, [words_of(tokenizer, chosen)]) == [chosen]
