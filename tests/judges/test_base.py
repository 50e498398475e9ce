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


class Looker(BrightnessJudge):
    """Looks at a picture once for all questions about it; remembers how many it saw at once."""

    name = "looker-1"

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[int] = []

    def ask(self, images: Tensor, rows: Sequence[int], questions: Sequence[str]) -> Tensor:
        self.looks.append(len(images))
        means = images.mean(dim=(1, 2, 3))
        return torch.stack(
            [
                means[row] if question == "bright" else 1 - means[row]
                for row, question in zip(rows, questions, strict=True)
            ]
        )


def test_several_questions_about_a_picture_take_one_look() -> None:
    images = shades(0.1, 0.9, float("nan"), 0.3)
    rows, questions = [1, 0, 3, 2, 1, 3, 0], ["bright", "dark", "bright", "dark", "dark", "dark", "dark"]
    expected = torch.tensor([0.9, 0.9, 0.3, torch.nan, 0.1, 0.7, 0.9])
    for batch_size, looks in ((1, [1, 1, 1]), (2, [2, 1]), (32, [3])):
        judge = Looker()
        answer = judge_questions(judge, images, questions, batch_size, rows)
        torch.testing.assert_close(answer, expected, equal_nan=True)
        assert (judge.looks, judge.batches) == (looks, [])
    # A judge that is only called sees a picture once for each question, and never more than a batch.
    plain = BrightnessJudge()
    answer = judge_questions(plain, images, ["bright"] * 7, 4, rows)
    torch.testing.assert_close(answer, torch.tensor([0.9, 0.1, 0.3, torch.nan, 0.9, 0.3, 0.1]), equal_nan=True)
    assert plain.batches == [4, 2]
    assert judge_questions(Looker(), images, [], rows=[]).shape == (0,)
    with pytest.raises(ValueError, match="1 questions for 2 pictures"):
        judge_questions(Looker(), images, ["bright"], rows=[0, 1])


def test_answers_to_several_questions_are_checked() -> None:
    class Wrong(Looker):
        def ask(self, images: Tensor, rows: Sequence[int], questions: Sequence[str]) -> Tensor:
            return torch.zeros(len(images))

    with pytest.raises(
        ValueError, match=r"returned shape \(1,\) for 2 questions; it must return one probability per q"
    ):
        judge_questions(Wrong(), shades(0.5), ["bright", "dark"], rows=[0, 0])


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
