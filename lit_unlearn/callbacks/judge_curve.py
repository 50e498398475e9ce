"""Tests the judge on pictures of the unedited model for which the correct answer is known from their prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.data.prompts import PictureItem
from lit_unlearn.evaluation.judge_curve import Curve, JudgeCurves
from lit_unlearn.judges.base import Judge, is_quick, judge_questions


def known_answers(
    concept: Concept, concepts: ConceptSet, items: Sequence[PictureItem], negatives: int | None
) -> list[tuple[int, bool]]:
    """Indices of the ``items`` whose prompt determines whether they show ``concept``, and whether they show it.

    Yes is correct for the concept's own prompts. No is correct for prompts of other concepts of the same kind, which
    draw something else instead. The answer is unknown for prompts of other kinds: a picture of "a dog" has some style,
    perhaps the one in question. It is also unknown for prompts of other concepts that name the concept, and for
    adversarial prompts.

    Args:
        concept: Concept of the judge's question.
        concepts: Concept set of the items.
        items: Pictures.
        negatives: Number of pictures of each other concept; None takes all.
    """
    known, all_concepts = [], list(concepts.concepts.values())
    for place, item in enumerate(items):
        asked_for = all_concepts[item.concept_index]
        if item.prompt_index >= len(asked_for.prompts):
            continue
        if asked_for.name == concept.name:
            known.append((place, True))
        elif asked_for.kind == concept.kind and not concept.find_name(item.prompt):
            number = item.image_index * len(asked_for.prompts) + item.prompt_index
            if negatives is None or number < negatives:
                known.append((place, False))
    return known


class JudgeCurve:
    """Precision and recall of the judge on the unedited model's pictures, for each edited concept.

    Args:
        judge: The judge.
        concepts: The concept set.
        edited: The edited concepts, whose questions are asked.
        images_per_prompt: Pictures of each prompt.
        negatives: Pictures of each other concept of the kind that the judge is asked about; None takes all of them if
            the judge is quick, as a classifier is, none at all if it is slow.
    """

    def __init__(
        self,
        judge: Judge,
        concepts: ConceptSet,
        edited: Sequence[Concept],
        images_per_prompt: int,
        negatives: int | None = None,
    ) -> None:
        self.judge, self.concepts, self.edited, self.negatives = judge, concepts, list(edited), negatives
        self.images_per_prompt = images_per_prompt
        self.is_asked = negatives != 0 and (negatives is not None or is_quick(judge))
        # A place for each evaluation prompt's pictures; counts are the same for all concepts.
        self.per_concept = (concepts.counts.direct + concepts.counts.indirect) * images_per_prompt
        self.metric = JudgeCurves([c.name for c in self.edited], self.per_concept * len(concepts.concepts))

    def update(self, pictures: Tensor, items: Sequence[PictureItem]) -> None:
        """Judge ``pictures`` (B, 3, H, W), uint8, which the unedited model drew of ``items``."""
        if not self.is_asked:
            return
        for concept in self.edited:
            known = known_answers(concept, self.concepts, items, self.negatives)
            rows = [row for row, _ in known]
            answers = judge_questions(self.judge, pictures[rows].float() / 255, [concept.question] * len(rows))
            places = [self._place(items[row]) for row in rows]
            self.metric.update(concept.name, places, answers, [label for _, label in known])

    def _place(self, item: PictureItem) -> int:
        return item.concept_index * self.per_concept + item.prompt_index * self.images_per_prompt + item.image_index

    def compute(self) -> dict[str, Curve]:
        """Curve of each edited concept; empty if the judge was not used. Every rank must call it."""
        return self.metric.curves() if self.is_asked else {}


def draw_curves(logger: Logger | None, curves: dict[str, Curve]) -> None:
    """Draw ``curves`` in TensorBoard as ``judge/<concept>``, if they have pictures with and without the concept."""
    if isinstance(logger, TensorBoardLogger):
        for name, curve in curves.items():
            if curve.labels.any() and not curve.labels.all():
                logger.experiment.add_pr_curve(f"judge/{name}", curve.labels, curve.answers, 0)
