from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tokenizers.pre_tokenizers import ByteLevel
from torch.testing import assert_close
from transformers import CLIPTokenizer

from helpers import load_copy
from lit_unlearn.data.names import find_names
from lit_unlearn.diffusion import prompts as module
from lit_unlearn.diffusion.discrete_prompts import whole_words
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.prompts import PromptReader, encode, encode_prompts, token_ids, tokenize

LENGTH = 32
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is warned of once in a process."""
    monkeypatch.setattr(module, "_WARNED_OF", set())


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


def test_a_cut_is_said_once(components: StableDiffusion) -> None:
    too_long = " ".join(["dog"] * LENGTH)
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            tokenize(components.tokenizer, [too_long, "a cat", too_long])
        tokenize(components.tokenizer, [f"{too_long} dog"])
    assert [str(warning.message).count("dog") for warning in said] == [LENGTH, LENGTH + 1]


def test_many_cuts_are_said_in_one_line(components: StableDiffusion) -> None:
    prompts = [" ".join(["dog"] * (LENGTH + more)) for more in range(7)]
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            tokenize(components.tokenizer, [*prompts, "a cat"])
    assert [str(warning.message) for warning in said] == [
        f"7 prompts have more tokens than the {LENGTH} that the text encoder reads; it ignores the rest of each. "
        f"The longest has {LENGTH + 8}: {prompts[-1]!r}."
    ]


@pytest.mark.parametrize("text", ["龍" * 12, "🐉" * 9, "é" * 17])
def test_characters_of_several_tokens_are_counted_as_such(text: str, byte_tokenizer: CLIPTokenizer) -> None:
    # Fewer characters than the encoder has positions, and more tokens.
    assert len(text) < LENGTH - 2 < len(token_ids(byte_tokenizer, [text])[0])
    with pytest.warns(UserWarning, match=f"{text}' has .* ignores the rest"):
        tokenize(byte_tokenizer, [text])


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> CLIPTokenizer:
    """A tokenizer of 256 bytes, as CLIP's for what it has no word for."""
    symbols = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*symbols, *(f"{s}</w>" for s in symbols), *SPECIAL])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


# --- words of several vectors


@pytest.fixture
def with_words(components: StableDiffusion) -> StableDiffusion:
    """``components`` with ``<cat-toy>`` of three vectors and ``<owl>`` of one, added as diffusers adds them."""
    table = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) / 5
    theirs = as_diffusers(components)
    theirs.load_textual_inversion({"<cat-toy>": table[:3]})
    theirs.load_textual_inversion({"<owl>": table[3:]})
    return components


def as_diffusers(components: StableDiffusion) -> StableDiffusionPipeline:
    theirs = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=components.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


WORDS = ["a <cat-toy> at sunset", "<owl> and <cat-toy>", "a dog", "<cat-toy><cat-toy>", "A <cat-toy>, a <owl>."]


def names(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in token_ids(tokenizer, texts)]


def test_a_word_of_several_vectors_is_all_of_them(with_words: StableDiffusion) -> None:
    tokenizer = with_words.tokenizer
    parts = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2"]
    assert names(tokenizer, ["a <cat-toy>", "<owl>"]) == [["a</w>", *parts], ["<owl>"]]
    assert with_words.texts[0].words("<cat-toy>") == tokenizer.convert_tokens_to_ids(parts)
    found = with_words.texts[0].names_mask(
        ["a dog", "a <cat-toy> at sunset"], lambda text: find_names(text, ["<cat-toy>"])
    )
    assert found.nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    templates, slots = with_words.texts[0].tokenize_templates(["a {} <cat-toy>"], 2)
    assert templates[0, 4:7].tolist() == tokenizer.convert_tokens_to_ids(parts)
    assert (slots[0] >= 0).sum() == 2
    first = with_words.texts[0].initial_embeddings(3, "<cat-toy>", torch.Generator())
    assert torch.equal(first, with_words.texts[0].table.detach()[tokenizer.convert_tokens_to_ids(parts)])
    assert not set(whole_words(tokenizer, None, ["a <cat-toy>"]).tolist()) & set(with_words.texts[0].words("a"))


def test_states_and_pictures_of_such_words_are_those_of_diffusers(with_words: StableDiffusion) -> None:
    theirs = as_diffusers(with_words)
    for prompt in WORDS:
        expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(with_words.encode([prompt]).states, expected)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    expected = theirs(WORDS[:2], generator=generators, **options).images
    found = with_words.draw(WORDS[:2], [3, 4], 3, 4.0)
    assert_close(found, expected, rtol=0, atol=1 / 255)
    alone = with_words.encode(with_words.tokenize(["a"])).states
    assert not torch.equal(with_words.encode(["a <cat-toy>"]).states, alone)


def test_a_model_without_such_words_is_read_as_ever(components: StableDiffusion) -> None:
    tokenizer = components.tokenizer
    texts = ["a dog_1", "<cat-toy>", "a  dog,at sunset!", ""]
    plain = tokenizer(texts, add_special_tokens=False).input_ids
    assert token_ids(tokenizer, texts) == plain
    assert token_ids(tokenizer, []) == []


# --- what is read


def test_what_is_read_ends_at_the_cut(components: StableDiffusion) -> None:
    reader = PromptReader((components.tokenizer,))
    fits, long = " ".join(["dog"] * (LENGTH - 2)), " ".join([*["dog"] * (LENGTH - 3), "Cat", "owl", "cat"])
    assert reader.texts([fits, long, ""]) == [fits, long.removesuffix(" owl cat"), ""]
    first, second = reader.ids([long, long.replace("owl", "parrot")])
    assert first == second
    assert len(first[0]) == LENGTH - 2
    assert reader.ids([fits])[0] != first


def test_no_word_is_read_in_half(byte_tokenizer: CLIPTokenizer) -> None:
    byte_tokenizer.model_max_length = 2 + 9
    read = PromptReader((byte_tokenizer,)).texts(["a cat caterpillar", "a cat cat", "a café caféteria", "一二三四五"])
    assert read == ["a cat", "a cat cat", "a café", "一二三"]


def test_of_several_encoders_the_one_that_reads_least_counts(components: StableDiffusion, tiny_sd: Path) -> None:
    short = load_copy(tiny_sd).tokenizer
    short.model_max_length = 5
    for tokenizers in ((short, components.tokenizer), (components.tokenizer, short)):
        assert PromptReader(tokenizers).texts(["a dog at sunset", "a dog"]) == ["a dog at", "a dog"]
        with pytest.warns(UserWarning, match="'a dog at sunset' has 6 tokens; the text encoder reads 5 and"):
            PromptReader(tokenizers).warn_of_cuts(["a dog at sunset", "a dog"])
        module._WARNED_OF.clear()


def test_a_cut_counts_the_vectors_of_a_word(with_words: StableDiffusion) -> None:
    fits = " ".join(["dog"] * (LENGTH - 5))
    # A word is read whole, or it is not the word.
    texts = [f"{fits} <cat-toy>", f"{fits} a <cat-toy>", f"{fits} dog a <cat-toy>"]
    assert ["<cat-toy>" in text for text in with_words.reader.texts(texts)] == [True, False, False]
    with pytest.warns(UserWarning, match=f"has {LENGTH + 1} tokens"):
        with_words.tokenize([f"{fits} a <cat-toy>"])
