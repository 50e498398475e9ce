from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_unlearn.core.subject_tokens import last_subject_token, subject_positions

BOS, EOS, PAD = 90, 91, 0
LENGTH = 8


def ids(*texts: list[int], pad: int = EOS) -> Tensor:
    rows = [[BOS, *text, EOS] for text in texts]
    return torch.tensor([row + [pad] * (LENGTH - len(row)) for row in rows])


@pytest.mark.parametrize("pad", [EOS, PAD])
def test_the_last_token_is_the_one_before_the_first_end_of_text(pad: int) -> None:
    # SD 1.x pads with EOS, SD 2.x with "!", whose id is 0; an empty phrase has but BOS.
    found = last_subject_token(ids([5], [5, 6, 7], [], [1, 2, 3, 4, 5, 6], pad=pad), EOS)
    assert found.tolist() == [1, 3, 0, 6]
    assert last_subject_token(torch.tensor([[BOS, 5, 6]]), EOS).tolist() == [2]  # cut off without an end


@pytest.mark.parametrize("pad", [EOS, PAD])
def test_only_the_last_token(pad: int) -> None:
    phrases, guides = ids([5, 6], [7], pad=pad), ids([8], [], pad=pad)
    rows, positions, (guide,) = subject_positions(phrases, [guides], EOS, "last_subject")
    assert (rows.tolist(), positions.tolist(), guide.tolist()) == ([0, 1], [2, 1], [1, 0])


@pytest.mark.parametrize("pad", [EOS, PAD])
def test_from_the_last_token_to_the_end_of_the_window(pad: int) -> None:
    phrases, guides = ids([5, 6], [7], pad=pad), ids([8], [9, 10, 11], pad=pad)
    rows, positions, (guide,) = subject_positions(phrases, [guides], EOS, "from_subject")
    # The code of 2023 drops as many positions at the end as the other text starts later.
    assert rows.tolist() == [0] * 6 + [1] * 5
    assert positions.tolist() == [*range(2, 8), *range(1, 6)]
    assert guide.tolist() == [*range(1, 7), *range(3, 8)]


def test_several_guides_share_the_positions_of_the_phrase() -> None:
    phrases = ids([5])
    guides = [ids([8]), ids([9, 10, 11]), ids([])]
    _, positions, found = subject_positions(phrases, guides, EOS, "from_subject")
    assert positions.tolist() == [1, 2, 3, 4, 5]
    assert [guide.tolist() for guide in found] == [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]


def test_all_positions_but_bos_are_aligned() -> None:
    phrases, guides = ids([1, 5, 2]), ids([1, 8, 9, 2])
    rows, positions, (guide,) = subject_positions(phrases, [guides], EOS, "all")
    assert rows.tolist() == [0] * 7
    assert positions.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert guide.tolist() == [1, 3, 4, 5, 6, 7, 7]  # the concept takes the last token of its target


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens='first' is unknown; choose one of last_subject, from_subject, all"):
        subject_positions(ids([5]), [ids([6])], EOS, "first")  # type: ignore[arg-type]


def test_a_tokenizer_without_bos() -> None:
    # T5: the text begins at position 0, and an empty one is its end.
    phrases, guides = torch.tensor([[5, 6, 1, 0, 0], [1, 0, 0, 0, 0]]), torch.tensor([[7, 1, 0, 0, 0]] * 2)
    assert last_subject_token(phrases, 1, begins=False).tolist() == [1, 0]
    rows, positions, (guide,) = subject_positions(phrases[:1], [guides[:1]], 1, "all", begins=False)
    assert (rows.tolist(), positions.tolist()) == ([0] * 5, [0, 1, 2, 3, 4])
    assert guide.tolist() == [0, 0, 1, 2, 3]  # both words take the guide's only one; its end and padding follow
