from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.emoji.captions import FRAMES, phrases, put_adjective, vocabulary
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.emoji.text_encoder import MAX_LENGTH, TextEncoderTraining, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer()


def test_every_word_of_a_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    pieces = {word: tokenizer.tokenize(word) for word in vocabulary()}
    assert {word: found for word, found in pieces.items() if found != [f"{word}</w>"]} == {"3d": ["3</w>", "d</w>"]}


@pytest.mark.parametrize("word", ["zebra", "xylophone", "unicycle", "qat", "don't", "2024"])
def test_an_unknown_word_falls_to_pieces_that_spell_it(word: str, tokenizer: CLIPTokenizer) -> None:
    assert word not in vocabulary()
    pieces = tokenizer.tokenize(word)
    assert len(pieces) > 1
    assert "".join(pieces).replace("</w>", "") == word
    assert tokenizer.unk_token not in pieces


def test_case_and_spacing_do_not_matter(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("A  Dog,at sunset").input_ids == tokenizer("a dog , at sunset").input_ids


def test_training_the_tokenizer_again_gives_the_same_tokens(tokenizer: CLIPTokenizer) -> None:
    # A resumed training of the text encoder relies on it.
    for _ in range(3):
        again = train_tokenizer()
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.tokenize("zebra xylophone unicycle") == tokenizer.tokenize("zebra xylophone unicycle")


def test_the_tokenizer_is_of_clips_form(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    # As in CLIP the end of text is the largest id, by which some readers find its position.
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    ids = tokenizer("a dog").input_ids
    assert (ids[0], ids[-1], len(ids)) == (tokenizer.bos_token_id, tokenizer.eos_token_id, 4)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_LENGTH
    assert (
        loaded("a glossy zebra 3d", padding="max_length").input_ids
        == tokenizer("a glossy zebra 3d", padding="max_length").input_ids
    )


def test_the_longest_caption_fits(tokenizer: CLIPTokenizer) -> None:
    words = phrases()

    def longest(texts: list[str]) -> str:
        return max(texts, key=lambda text: len(tokenizer.tokenize(text)))

    def of(attribute: str) -> list[str]:
        return [p for kinds in words[attribute].values() for kind in ("direct", "indirect") for p in kinds[kind]]

    adjectives = [adjective for kinds in words["style"].values() for adjective in kinds["adjective"]]
    subjects = of("subject")
    heads = [longest(subjects), longest([put_adjective(s, a) for s, a in product(subjects, adjectives)])]
    frame, style, scene = longest(list(FRAMES)), longest(of("style")), longest(of("scene"))
    worst = longest([f"{frame.format(heads[0])} {style} {scene}", f"{frame.format(heads[1])} {scene}"])
    assert len(tokenizer(worst).input_ids) <= MAX_LENGTH


def test_the_prompts_of_emoji20_fit(tokenizer: CLIPTokenizer) -> None:
    for concept in load_concept_set("emoji20").concepts.values():
        for prompt in (*concept.prompts, *concept.edit_prompts, *concept.target_prompts):
            assert len(tokenizer(prompt).input_ids) <= MAX_LENGTH, prompt


def test_training_reads_the_end_of_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TextEncoderTraining(hidden_size=16, num_layers=2, num_heads=2).eval()
    logits = module.logits(["a dog", "a cat at sunset"])
    assert {name: tuple(logit.shape) for name, logit in logits.items()} == {
        name: (2, len(values)) for name, values in ATTRIBUTES.items()
    }
    ids = module.tokenizer(["a dog", "a cat at sunset"], padding="max_length", return_tensors="pt").input_ids
    states = module.text_encoder(ids).last_hidden_state
    assert torch.equal(logits["scene"], module.heads["scene"](states[[0, 1], [3, 5]]))
    # What is saved loads with the plain classes and says the same.
    module.save_pretrained(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(["a dog", "a cat at sunset"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(encoder.eval()(ids).last_hidden_state, states)
