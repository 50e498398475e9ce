from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import load_copy
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.prompts import encode, encode_prompts, tokenize

LENGTH = 32


def test_prompts_are_framed_and_padded(components: StableDiffusion) -> None:
    tokenizer = components.tokenizer
    ids = tokenize(tokenizer, ["a dog", ""])
    a, dog = tokenizer.convert_tokens_to_ids(["a</w>", "dog</w>"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids.tolist() == [[bos, a, dog] + [eos] * (LENGTH - 3), [bos] + [eos] * (LENGTH - 1)]


def test_stable_diffusion_2_pads_with_another_token(tiny_sd2: Path) -> None:
    tokenizer = load_copy(str(tiny_sd2)).tokenizer
    ids = tokenize(tokenizer, ["a dog"])[0].tolist()
    padding = tokenizer.convert_tokens_to_ids("!")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[4:] == [padding] * (LENGTH - 4)


def test_a_prompt_that_is_cut_off_is_named(components: StableDiffusion) -> None:
    fits = " ".join(["dog"] * (LENGTH - 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(components.tokenizer, [fits, "a cat"])
    too_long = f"{fits} dog"
    with pytest.warns(UserWarning, match=rf"The prompt '{too_long}' has {LENGTH + 1} tokens; .* reads {LENGTH} "):
        cut = tokenize(components.tokenizer, ["a cat", too_long])
    assert torch.equal(cut[1], ids[0])


def test_a_word_in_pieces_counts_by_pieces(components: StableDiffusion) -> None:
    with pytest.warns(UserWarning, match="ignores the rest"):
        tokenize(components.tokenizer, ["zq" * LENGTH])


def test_states_are_the_text_encoders_last(components: StableDiffusion) -> None:
    prompts = ["a dog", "a cat in the rain", ""]
    ids = tokenize(components.tokenizer, prompts)
    states = encode(components.text_encoder, ids)
    hidden = components.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states, components.text_encoder.final_layer_norm(hidden))
    assert torch.equal(states, encode_prompts(components.tokenizer, components.text_encoder, prompts))
    assert states.shape == (3, LENGTH, 32)


def test_states_of_a_prompt_do_not_depend_on_the_others(components: StableDiffusion) -> None:
    together = encode_prompts(components.tokenizer, components.text_encoder, ["a dog", "a cat", "an owl at sunset"])
    alone = encode_prompts(components.tokenizer, components.text_encoder, ["a cat"])
    # Float32 states of order 1; matrix products of other sizes round differently.
    assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
