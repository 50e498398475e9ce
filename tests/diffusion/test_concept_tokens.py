from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from lit_unlearn.data.concepts import available_concept_sets, load_concept_set
from lit_unlearn.data.names import find_names
from lit_unlearn.diffusion.concept_tokens import difference_mask, eot_mask, names_mask
from lit_unlearn.diffusion.prompts import tokenize


@pytest.fixture
def tokenizer(tiny_sd: Path) -> CLIPTokenizer:
    """Pads with the end-of-text token, as Stable Diffusion 1.x does."""
    return CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")


@pytest.fixture
def tokenizer2(tiny_sd2: Path) -> CLIPTokenizer:
    """Pads with "!", as Stable Diffusion 2.x does."""
    return CLIPTokenizer.from_pretrained(tiny_sd2 / "tokenizer")


def marked(tokenizer: CLIPTokenizer, ids: Tensor, mask: Tensor) -> list[list[str]]:
    """The marked tokens of each prompt, as they are written."""
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[tokenizer.convert_ids_to_tokens(i) for i, m in zip(*row, strict=True) if m] for row in rows]


def test_names_are_marked_wherever_they_stand(tokenizer: CLIPTokenizer) -> None:
    names = ["soccer ball", "soccer", "football"]
    prompts = ["a soccer ball and a Soccer Ball", "soccer in the rain", "a ball", "the ball, a soccer-ball"]
    mask = names_mask(tokenizer, prompts, lambda prompt: find_names(prompt, names))
    expected = [["soccer</w>", "ball</w>"] * 2, ["soccer</w>"], [], ["soccer</w>", "-</w>", "ball</w>"]]
    assert marked(tokenizer, tokenize(tokenizer, prompts), mask) == expected
    # A name of several tokens counts as a whole only: "ball" alone is no part of it.
    assert mask.nonzero().tolist() == [[0, 2], [0, 3], [0, 6], [0, 7], [1, 1], [3, 5], [3, 6], [3, 7]]


def test_a_name_within_a_word_does_not_count(tokenizer: CLIPTokenizer) -> None:
    prompts = ["a brain", "a rain"]
    # The tokenizer knows no brain and writes it with the token of the rain.
    ids = tokenize(tokenizer, prompts)
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist())[1:4] == ["a</w>", "b", "rain</w>"]
    assert names_mask(tokenizer, prompts, lambda prompt: find_names(prompt, ["rain"])).sum(-1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a \u202asoccer\u200b ball\u202c", "soccer ball"),  # characters that nobody sees
        ("a \uff53\uff4f\uff43\uff43\uff45\uff52_BALL", "soccer ball"),  # full width
        ("a jalapen\u0303o", "jalapeño"),
        ("我有一只狗", "狗"),
    ],
)
def test_tokens_of_a_name_are_those_of_its_letters_however_it_is_written(
    tokenizer: CLIPTokenizer, prompt: str, name: str
) -> None:
    (place,) = find_names(prompt, [name])
    mask = names_mask(tokenizer, [prompt], lambda text: find_names(text, [name]))[0]
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    read = "".join(prompt[first:end] for (first, end), marked in zip(offsets, mask, strict=False) if marked)
    assert mask.any() and not mask[0] and set(prompt[slice(*place)]) <= {*read, " ", "\u0303"}


def test_the_shipped_names_are_marked_token_by_token(tokenizer: CLIPTokenizer) -> None:
    for name in available_concept_sets():
        for concept in load_concept_set(name).concepts.values():
            # The prompts of paper20 are too long for this tokenizer; what is left does.
            ids = tokenizer(
                list(concept.edit_prompts), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            mask = names_mask(tokenizer, concept.edit_prompts, concept.occurrences)
            phrases = [tokenizer(phrase, add_special_tokens=False).input_ids for phrase in concept.names]
            for prompt, row, marks in zip(concept.edit_prompts, ids.tolist(), mask, strict=True):
                expected = torch.zeros_like(marks)
                words = tokenizer.convert_ids_to_tokens(row)
                for phrase in phrases:
                    for start in range(1, len(row) - len(phrase)):
                        whole = start == 1 or words[start - 1].endswith("</w>")
                        if whole and row[start : start + len(phrase)] == phrase:
                            expected[start : start + len(phrase)] = True
                assert torch.equal(marks, expected), prompt


def test_prompts_differ_from_their_targets_between_shared_ends(tokenizer: CLIPTokenizer) -> None:
    pairs = [
        ("the pet that barks at sunset", "the bird that talks at sunset", ["pet", "that", "barks"]),
        ("a dog", "a soccer ball", ["dog"]),
        ("a soccer ball at sunset", "a cat at sunset", ["soccer", "ball"]),
        ("a dog", "a red dog", []),  # only words added
        ("a red dog", "a dog", ["red"]),
        ("dog dog", "dog", ["dog"]),  # shared tokens are not counted twice
    ]
    ids, targets = (tokenize(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    mask = difference_mask(ids, targets, tokenizer.eos_token_id)
    words = [[token.removesuffix("</w>") for token in row] for row in marked(tokenizer, ids, mask)]
    assert words == [pair[2] for pair in pairs]


def test_the_difference_equals_a_brute_force_search(tokenizer: CLIPTokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    words = ["dog", "cat", "rain"]
    for _ in range(200):
        sizes = torch.randint(1, 5, (2,), generator=generator).tolist()
        texts = [[words[i] for i in torch.randint(3, (size,), generator=generator)] for size in sizes]
        ids, targets = (tokenize(tokenizer, [" ".join(text)]) for text in texts)
        found = difference_mask(ids, targets, tokenizer.eos_token_id)[0, 1 : 1 + sizes[0]].tolist()
        # The shortest span whose replacement by anything gives the target; of several, the last.
        text, target = texts
        spans = [
            (stop - start, -start)
            for start in range(len(text) + 1)
            for stop in range(start, len(text) + 1)
            if start + len(text) - stop <= len(target)
            and text[:start] == target[:start]
            and text[stop:] == target[len(target) - len(text) + stop :]
        ]
        length, start = min(spans)
        assert found == [-start <= place < -start + length for place in range(len(text))], texts


def test_the_end_of_text_is_one_token_whatever_the_padding(tokenizer: CLIPTokenizer, tokenizer2: CLIPTokenizer) -> None:
    prompts = ["a dog", "the dog at sunset"]
    ends = [3, 5]
    for known, all_of_it in ((tokenizer, [29, 27]), (tokenizer2, [1, 1])):
        ids = tokenize(known, prompts)
        first = eot_mask(ids, known.eos_token_id)
        assert first.nonzero().tolist() == [[0, ends[0]], [1, ends[1]]]
        every = eot_mask(ids, known.eos_token_id, "all_eot")
        # SD 1.x pads with the end-of-text token: the reference's rule marks all of the padding there.
        assert every.sum(-1).tolist() == all_of_it
        assert not every[0, : ends[0]].any()
        assert not every[1, : ends[1]].any()


def test_a_begin_that_has_the_number_of_the_end_is_not_marked() -> None:
    ids = torch.tensor([[9, 1, 9, 9]])
    assert eot_mask(ids, 9).tolist() == [[False, False, True, False]]
    assert eot_mask(ids, 9, "all_eot").tolist() == [[False, False, True, True]]
