"""Measures how well a judge distinguishes pictures that show a concept from pictures that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision

NOT_ASKED, FAILED = -2.0, -1.0
"""States of a picture without an answer; merging replicas by the maximum prefers an answer in [0, 1] to both."""


@dataclass(frozen=True)
class Curve:
    """A judge's answers to one question about pictures for which the correct answer is known.

    Attributes:
        answers: Probabilities of yes, (N,).
        labels: Whether yes is correct, (N,), bool.
        failed: Number of further pictures that it did not answer, which count neither as yes nor as no.
    """

    answers: Tensor
    labels: Tensor
    failed: int = 0

    def numbers(self) -> dict[str, float | int | None]:
        """Numbers that summarise the curve; a number is None if there are no pictures for it.

        Returns:
            ``average_precision``: precision averaged over the steps of recall, which depends on the ratio of pictures
            with and without the concept; ``recall`` and ``false_yes``: share of yes, at 0.5, among pictures for which
            yes is correct and for which it is wrong; ``positives``, ``negatives``, ``failed``: numbers of pictures.
        """
        yes = self.answers >= 0.5
        positives, negatives = yes[self.labels], yes[~self.labels]
        both = len(positives) and len(negatives)
        return {
            "average_precision": float(binary_average_precision(self.answers, self.labels.int())) if both else None,
            "recall": float(positives.double().mean()) if len(positives) else None,
            "false_yes": float(negatives.double().mean()) if len(negatives) else None,
            "positives": len(positives),
            "negatives": len(negatives),
            "failed": self.failed,
        }


class JudgeCurves(Metric):
    """Collects a curve for each of several questions; the place of a picture does not depend on batches or processes.

    Args:
        names: Names of the questions.
        num_pictures: Number of pictures.
        **kwargs: Passed on to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    answers: Tensor
    labels: Tensor

    def __init__(self, names: Sequence[str], num_pictures: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        shape = (len(self.names), num_pictures)
        self.add_state("answers", torch.full(shape, NOT_ASKED), dist_reduce_fx="max")
        self.add_state("labels", torch.zeros(shape, dtype=torch.int8), dist_reduce_fx="max")

    def update(self, name: str, places: Sequence[int], answers: Tensor, labels: Sequence[bool]) -> None:
        """Add answers.

        Args:
            name: Name of the question.
            places: Places of B pictures; a picture added twice counts once, with the larger answer.
            answers: Probabilities of yes, (B,); nan where the judge did not answer.
            labels: Whether yes is correct, B of them.
        """
        row, columns = self.names.index(name), torch.tensor(places, dtype=torch.long)
        entered = torch.where(answers.isnan(), FAILED, answers.float()).to(self.answers)
        self.answers[row, columns] = torch.maximum(self.answers[row, columns], entered)
        self.labels[row, columns] = torch.tensor(labels, dtype=torch.int8).to(self.labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Answers and labels (questions, pictures) of all processes; ``curves`` converts them to curves."""
        return self.answers, self.labels

    def curves(self) -> dict[str, Curve]:
        """Curve of each question, by name; every rank must call it."""
        curves = {}
        rows = (state.cpu().reshape(len(self.names), -1) for state in self.compute())
        for name, answers, labels in zip(self.names, *rows, strict=True):
            told = answers >= 0
            curves[name] = Curve(answers[told], labels[told].bool(), int((answers == FAILED).sum()))
        return curves
