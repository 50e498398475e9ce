"""Token alignment of edit and target prompts on hand-made id sequences."""

from __future__ import annotations

import random

import pytest
import torch

from lit_unlearn.core.alignment import align_tokens, from_first_difference, positions_mask

BOS, EOS, EXCLAMATION = 900, 901, 0
VOCABULARY = (
    "a",
    "photo",
    "of",
    "the",
    "blue",
    "jay",
    "pigeon",
    "red",
    "golden",
    "hawk",
    "flying",
    "dog",
    "and",
    "cat",
)
WORDS = {word: index for index, word in enumerate(VOCABULARY, start=1)}


def ids(text: str, length: int = 12, pad: int = EOS, bos: bool = True, eos: bool = True) -> list[int]:
    """Token ids, one per word, padded as SD 1.x does (with EOS) unless told otherwise."""
    tokens = [BOS] * bos + [WORDS[word] for word in text.split()] + [EOS] * eos
    assert len(tokens) <= length
    return tokens + [pad] * (length - len(tokens))


def test_docstring_example() -> None:
    edit = ids("a photo of blue jay flying", length=9)
    target = ids("a photo of pigeon flying", length=9)
    assert align_tokens(edit, target, EOS) == [0, 1, 2, 3, 4, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("edit", "target", "expected"),
    [
        # Same number of tokens: the identity.
        ("a photo of blue jay", "a photo of blue jay", list(range(12))),
        ("a dog flying", "a pigeon flying", list(range(12))),
        ("blue jay flying", "red hawk flying", list(range(12))),
        ("", "", list(range(12))),
        # Two tokens to one and back; EOS follows the text, padding follows EOS, and the last position is clamped.
        ("a blue jay flying", "a pigeon flying", [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("a pigeon flying", "a blue jay flying", [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),
        # Three to two and two to three: ends to ends, halves round up.
        ("a golden blue jay flying", "a red hawk flying", [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("a red hawk flying", "a golden blue jay flying", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 11]),
        # Four to two.
        ("the golden blue jay", "red hawk", [0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]),
        # Concept at the start and at the end of the prompt.
        ("blue jay and a dog", "pigeon and a dog", [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("a photo of blue jay", "a photo of pigeon", [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
        # Pure deletion: tokens without a counterpart take the token before the gap.
        ("a blue dog", "a dog", [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("a dog and cat", "a dog", [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("blue dog", "dog", [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        # Pure insertion: the target's extra tokens are left out.
        ("a dog", "a blue dog", [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),
        ("", "blue dog", [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]),
        ("blue dog", "", [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        # Shared words inside the concept or repeated around it do not confuse the ends.
        ("blue jay", "red jay", list(range(12))),
        ("dog dog", "dog", [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("dog", "dog dog", [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),
        ("a dog and a cat", "a cat and a cat", list(range(12))),
        # Nothing shared at all.
        ("blue jay flying", "dog", [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
@pytest.mark.parametrize("pad", [EOS, EXCLAMATION])
def test_alignment(edit: str, target: str, expected: list[int], pad: int) -> None:
    assert align_tokens(ids(edit, pad=pad), ids(target, pad=pad), EOS) == expected


def test_alignment_without_bos_or_padding() -> None:
    edit, target = ids("a blue jay flying", 5, bos=False), ids("a pigeon flying", 5, bos=False)
    assert align_tokens(edit, target, EOS) == [0, 1, 1, 2, 3]
    # Unpadded prompts have different lengths.
    assert align_tokens(ids("a blue jay", 5), ids("a dog", 4), EOS) == [0, 1, 2, 2, 3]
    assert align_tokens(ids("a dog", 4), ids("a blue jay", 5), EOS) == [0, 1, 3, 4]
    # A gap at the very start without BOS has no token before it.
    assert align_tokens(ids("blue dog", 3, bos=False), ids("dog", 3, bos=False), EOS) == [0, 0, 1]


def test_alignment_of_truncated_prompts() -> None:
    def text(words: str) -> list[int]:
        return ids(words, 6, eos=False)

    # Without EOS everything is text, aligned from both ends.
    assert align_tokens(text("a photo of a dog"), text("a photo of a cat"), EOS) == [0, 1, 2, 3, 4, 5]
    # EOS in the last position, as CLIP's tokenizer truncates: both lost different words at the end.
    edit, target = ids("a blue jay and dog", 7), ids("a pigeon and dog flying", 7)
    assert align_tokens(edit, target, EOS)[-1] == 6
    # One prompt fills the window without EOS, the other does not: the rest goes to the last position.
    assert align_tokens(ids("a dog", 6), text("a photo of a dog"), EOS) == [0, 1, 5, 5, 5, 5]
    assert align_tokens(text("a photo of a dog"), ids("a dog", 6), EOS) == [0, 1, 1, 1, 1, 2]


def test_padding_id_may_occur_in_the_text() -> None:
    # SD 2.x pads with "!", which a prompt may contain.
    edit = [BOS, 5, 6, EXCLAMATION, EOS, EXCLAMATION, EXCLAMATION]
    target = [BOS, 7, EXCLAMATION, EOS, EXCLAMATION, EXCLAMATION, EXCLAMATION]
    assert align_tokens(edit, target, EOS) == [0, 1, 1, 2, 3, 4, 5]


def test_bos_may_have_the_id_of_eos() -> None:
    edit, target = [EOS, 5, 6, EOS, EOS], [EOS, 7, EOS, EOS, EOS]
    assert align_tokens(edit, target, EOS) == [0, 1, 1, 2, 3]
    assert positions_mask(edit, EOS, "content").tolist() == [False, True, True, False, False]


def test_alignment_accepts_tensors_and_rejects_empty_prompts() -> None:
    edit, target = ids("a blue jay"), ids("a dog")
    assert align_tokens(torch.tensor(edit), torch.tensor(target), EOS) == align_tokens(edit, target, EOS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edit_ids has 0 and target_ids 12 tokens"):
        align_tokens([], target, EOS)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("pad", [EOS, EXCLAMATION])
def test_any_pair_keeps_order_range_and_shared_tokens(seed: int, pad: int) -> None:
    rng = random.Random(seed)
    length = 20

    def words(low: int, high: int, start: int) -> list[int]:
        return [rng.randrange(start, start + 50) for _ in range(rng.randint(low, high))]

    # Words, concept and target come from separate ids, so that the true spans are known.
    before, concept, other, after = words(0, 4, 1), words(1, 4, 100), words(1, 4, 200), words(0, 4, 300)
    edit, target = ([BOS, *before, *span, *after, EOS] for span in (concept, other))
    end, target_end = len(edit) - 1, len(target) - 1
    edit, target = (sequence + [pad] * (length - len(sequence)) for sequence in (edit, target))
    positions = align_tokens(edit, target, EOS)

    assert len(positions) == length
    assert positions == sorted(positions) and positions[0] >= 0 and positions[-1] < length
    first, last = 1 + len(before), len(before) + len(concept)
    target_first, target_last = 1 + len(before), len(before) + len(other)
    assert positions[last] == target_last
    assert positions[first] == (target_first if len(concept) > 1 else target_last)
    assert positions[end] == target_end
    for position in (*range(first), *range(last + 1, end)):
        assert edit[position] == target[positions[position]]
    # Steps within the concept differ by one at most: the spread is even.
    steps = [b - a for a, b in zip(positions[first:last], positions[first + 1 : last + 1], strict=True)]
    assert not steps or max(steps) - min(steps) <= 1
    for offset, position in enumerate(positions[end:]):
        assert position == min(target_end + offset, length - 1)
    assert align_tokens(edit, edit, EOS) == list(range(length))


def test_positions_from_the_first_difference_on() -> None:
    pairs = [
        ("a photo of blue jay flying", "a photo of pigeon flying"),
        ("dog", "cat"),
        ("a dog", "a dog flying"),
        ("a dog", "a dog"),
    ]
    edit, target = (torch.tensor([ids(pair[side], length=9) for pair in pairs]) for side in (0, 1))
    first = [row.nonzero().flatten().tolist() for row in from_first_difference(edit, target)]
    assert first == [[4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], []]


@pytest.mark.parametrize("pad", [EOS, EXCLAMATION])
def test_positions_mask(pad: int) -> None:
    prompt = ids("a blue jay", length=7, pad=pad)  # BOS a blue jay EOS pad pad

    def positions(which: str) -> list[int]:
        return positions_mask(prompt, EOS, which).nonzero().flatten().tolist()  # type: ignore[arg-type]

    assert positions("all") == [0, 1, 2, 3, 4, 5, 6]
    assert positions("no_bos") == [1, 2, 3, 4, 5, 6]
    assert positions("content") == [1, 2, 3]
    assert positions("eot") == [4, 5, 6]


def test_positions_mask_of_a_batch_is_that_of_its_rows() -> None:
    rows = [
        ids("", 8),
        ids("a dog", 8),
        ids("a photo of blue jay", 8, pad=EXCLAMATION),
        ids("a photo of the blue jay flying", 8, eos=False),
    ]
    batch = torch.tensor(rows)
    for which in ("all", "no_bos", "content", "eot"):
        mask = positions_mask(batch, EOS, which)  # type: ignore[arg-type]
        assert mask.dtype == torch.bool and mask.shape == batch.shape
        for row, expected in zip(mask, rows, strict=True):
            assert row.tolist() == positions_mask(expected, EOS, which).tolist()  # type: ignore[arg-type]
    assert positions_mask(rows[0], EOS, "content").sum() == 0
    assert positions_mask(rows[3], EOS, "content").sum() == 7  # no EOS: all but BOS
    assert positions_mask(rows[3], EOS, "eot").sum() == 0
    exclusive = positions_mask(batch, EOS, "content").int() + positions_mask(batch, EOS, "eot").int()
    assert (exclusive == positions_mask(batch, EOS, "no_bos").int()).all()


def test_positions_mask_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match="which='eos' is unknown; choose one of all, no_bos, content, eot"):
        positions_mask(ids("a dog"), EOS, "eos")  # type: ignore[arg-type]
