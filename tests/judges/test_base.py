from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_unlearn.judges.base import Judge, judge_questions


class BrightnessJudge:
    """Answers with the mean of the picture; cannot tell when asked about 'taste'."""

    name = "brightness-1"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.batches.append(len(images))
        known = torch.tensor([question != "taste" for question in questions])
        return images.mean(dim=(1, 2, 3)).masked_fill(~known, torch.nan)


def shades(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_the_protocol_is_a_name_and_a_call() -> None:
    assert isinstance(BrightnessJudge(), Judge)
    assert not isinstance(lambda images, questions: images, Judge)


def test_pictures_keep_their_order_and_questions_whatever_the_batch_size() -> None:
    images, questions = shades(0.1, 0.9, 0.3, 0.7, 0.5), ["bright", "bright", "taste", "bright", "bright"]
    expected = torch.tensor([0.1, 0.9, torch.nan, 0.7, 0.5])
    for batch_size, batches in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (32, [5])):
        judge = BrightnessJudge()
        torch.testing.assert_close(judge_questions(judge, images, questions, batch_size), expected, equal_nan=True)
        assert judge.batches == batches


def test_a_broken_picture_is_not_judged_and_not_shown() -> None:
    judge = BrightnessJudge()
    images = shades(0.1, float("nan"), 0.3, float("inf"))
    answer = judge_questions(judge, images, ["bright"] * 4)
    torch.testing.assert_close(answer, torch.tensor([0.1, torch.nan, 0.3, torch.nan]), equal_nan=True)
    assert judge.batches == [2]


def test_no_pictures_are_no_answers() -> None:
    judge = BrightnessJudge()
    assert judge_questions(judge, torch.zeros(0, 3, 4, 4), []).shape == (0,)
    assert judge.batches == []


def test_half_precision_answers_become_float32_without_gradient() -> None:
    images = shades(0.25, 0.5).bfloat16().requires_grad_()
    answer = judge_questions(BrightnessJudge(), images, ["bright"] * 2)
    assert answer.dtype == torch.float32
    assert not answer.requires_grad
    assert answer.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("images", "questions", "message"),
    [
        (shades(0.1, 0.2), ["bright"], "1 questions for 2 pictures"),
        (shades(0.1, 0.2), "ab", "one text for 2 pictures"),
        (shades(0.1)[0], ["bright"], r"shape \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["bright"], "uint8"),
        (shades(0.1, -0.5), ["bright"] * 2, r"Picture 1 has values from -0.5 .*clamp"),
        (shades(1.5), ["bright"], "Picture 0 has values from 1.5 to 1.5"),
    ],
)
def test_what_does_not_fit_is_named(images: Tensor, questions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_questions(BrightnessJudge(), images, questions)


def test_a_judge_that_returns_no_probabilities_is_named() -> None:
    class Logits(BrightnessJudge):
        name = "logits-1"

        def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
            return super().__call__(images, questions) * 10

    class Pairs(BrightnessJudge):
        name = "pairs-1"

        def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
            return torch.zeros(len(images), 2)

    with pytest.raises(ValueError, match="'logits-1' returned 5"):
        judge_questions(Logits(), shades(0.5), ["bright"])
    with pytest.raises(ValueError, match=r"'pairs-1' returned shape \(1, 2\)"):
        judge_questions(Pairs(), shades(0.5), ["bright"])
    with pytest.raises(ValueError, match="batch_size=0"):
        judge_questions(Pairs(), shades(0.5), ["bright"], batch_size=0)
