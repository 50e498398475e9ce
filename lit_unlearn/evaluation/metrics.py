"""Forget and retain scores, their harmonic mean, and confidence intervals of shares of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

ERR_TERMS = ("forget_direct", "retain", "adjacent", "forget_indirect", "forget_adversarial")
"""The challenge's score is the harmonic mean of these scores."""

NOT_JUDGED = -2
FAILED = -1
"""States of a picture. Replicas are merged by their maximum, so ``FAILED`` is greater than ``NOT_JUDGED``, and a
verdict (0 or 1) is greater than both."""


def harmonic_mean(*scores: float) -> float:
    """Return ``n / (1/a + 1/b + ...)``, for two scores ``2ab / (a + b)``; 0 if one is 0, nan if one is nan.

    Raises:
        ValueError: A score is negative, or there is no score.
    """
    if not scores or min(scores) < 0:
        raise ValueError(f"harmonic_mean{scores}: give scores, none of them negative.")
    if any(map(math.isnan, scores)):
        return math.nan
    return 0.0 if 0 in scores else len(scores) / math.fsum(1 / score for score in scores)


def both_harmonic_means(forget: Sequence[float], retain: Sequence[float]) -> tuple[float, float]:
    """Return the two harmonic means that are in use for scores of several concepts.

    They differ: a concept that was not forgotten at all lowers the second one strongly and the first one little.

    Args:
        forget: Forget score per concept.
        retain: Retain score per concept, in the same order.

    Returns:
        The harmonic mean of the average scores (the paper's Table 5), and the average of the concepts' harmonic means.

    Raises:
        ValueError: There are no scores, or not as many retain as forget scores.
    """
    if len(forget) != len(retain) or not forget:
        raise ValueError(f"{len(forget)} forget and {len(retain)} retain scores: give one of each per concept.")
    of_averages = harmonic_mean(fmean(forget), fmean(retain))
    return of_averages, fmean(harmonic_mean(f, r) for f, r in zip(forget, retain, strict=True))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927); it lies in [0, 1] and is not empty at 0 and 1.

    Trials are treated as independent, so for pictures of few prompts the true uncertainty is larger.

    Args:
        successes: Number of successful trials.
        trials: Number of all trials; 0 gives (0, 1), because nothing is known.
        confidence: Probability that such an interval contains the true share.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: There are more successes than trials, a number is negative, or the confidence is not in (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: expected 0 <= successes <= trials.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, e.g. 0.95.")
    if trials == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # Exact at 0 and 1, where rounding would give 1e-17 or 1 - 1e-16.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


class ForgetRetain(Metric):
    """Forget and retain score of an edit: the share of pictures without the edited concepts, and with the others.

    Each picture has its own position in the state, given by concept, prompt and number. A picture that is judged twice
    counts once, so repeated pictures of a distributed sampler do not change the scores, and neither do order and batch
    size. (Two different verdicts on one picture count as yes.) A picture without an answer of the judge is missing: it
    counts neither as forgotten nor as retained.

    Call ``update`` and not the metric itself, which would also compute the scores of each batch.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    verdicts: Tensor
    others: Tensor

    def __init__(
        self,
        concepts: Sequence[str],
        edited: Sequence[str],
        images_per_concept: int,
        num_direct: int,
        images_per_prompt: int = 1,
        confidence: float = 0.95,
        adjacent: Sequence[str] = (),
        num_adversarial: int = 0,
        **kwargs: Any,
    ) -> None:
        """Make the metric of one edit.

        Args:
            concepts: All concepts of the set, in the order of ``concept_index``.
            edited: The edited concepts; empty for an unedited model, whose forget score is then nan.
            images_per_concept: Pictures of each concept, over all its direct and indirect prompts.
            num_direct: Number of direct prompts of a concept; they come first, then the indirect prompts.
            images_per_prompt: Pictures (seeds) of each prompt.
            confidence: Confidence of the intervals.
            adjacent: Concepts nearest to the edited ones, whose retention is also scored separately.
            num_adversarial: Number of further, adversarial prompts of a concept; they come last.
            **kwargs: Passed on to ``torchmetrics.Metric``.

        Raises:
            ValueError: The numbers do not fit together, an edited concept is unknown, or a concept is given twice.
        """
        super().__init__(**kwargs)
        self.concepts, self.edited = tuple(concepts), tuple(edited)
        for field, names in (("concepts", self.concepts), ("edited", self.edited)):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{field} holds {repeated[0]!r} more than once.")
        if not self.concepts:
            raise ValueError("concepts is empty; there is nothing to score.")
        if unknown := [name for name in self.edited if name not in self.concepts]:
            raise ValueError(f"edited concept {unknown[0]!r} is none of the concepts: {', '.join(self.concepts)}.")
        if images_per_prompt < 1 or images_per_concept < 1 or images_per_concept % images_per_prompt:
            raise ValueError(
                f"images_per_concept={images_per_concept} must be a positive multiple of "
                f"images_per_prompt={images_per_prompt}."
            )
        if wrong := [name for name in adjacent if name not in self.concepts or name in self.edited]:
            raise ValueError(f"adjacent concept {wrong[0]!r} is no concept of the set, or is edited itself.")
        self.adjacent, self.num_adversarial = tuple(adjacent), num_adversarial
        self.images_per_concept = images_per_concept
        self.images_per_prompt = images_per_prompt
        self.num_prompts = images_per_concept // images_per_prompt
        self.num_direct = num_direct
        self.confidence = confidence
        if not 0 <= num_direct <= self.num_prompts:
            raise ValueError(f"num_direct={num_direct} must lie between 0 and the {self.num_prompts} prompts.")
        if num_adversarial < 0:
            raise ValueError(f"num_adversarial={num_adversarial} cannot be negative.")
        shape = (len(self.concepts), self.num_prompts + num_adversarial, images_per_prompt)
        self.add_state(
            "verdicts", default=torch.full(shape, NOT_JUDGED, dtype=torch.int8), dist_reduce_fx="max", persistent=False
        )
        # Pictures of other concepts' prompts: by the edited concept in question, then as above.
        self.others = torch.full((len(self.edited), *shape), NOT_JUDGED, dtype=torch.int8)[:, :, : self.num_prompts]
        if self.edited:
            self.add_state("others", default=self.others.clone(), dist_reduce_fx="max", persistent=False)

    def update(
        self,
        probability: Tensor,
        concept_index: Tensor | Sequence[int],
        prompt_index: Tensor | Sequence[int],
        image_index: Tensor | Sequence[int],
        asked: str | None = None,
    ) -> None:
        """Add the judge's answers on B pictures.

        Args:
            probability: Probability that the picture shows the concept in question, (B,), in [0, 1]; at least 0.5 means
                yes, nan means that the judge gave no answer.
            concept_index: Index in ``concepts`` of the concept whose prompt the picture was drawn from, (B,).
            prompt_index: Number of the prompt, (B,): direct prompts first, then indirect, then adversarial ones.
            image_index: Number of the picture among the pictures of its prompt, (B,).
            asked: The edited concept in question, for pictures of other concepts' prompts; None if it is each prompt's
                own concept.

        Raises:
            ValueError: Lengths differ, an index or a probability is out of range, or ``asked`` is not an edited concept
                or the prompts' own.
        """
        if asked is not None and asked not in self.edited:
            raise ValueError(
                f"asked={asked!r} is not an edited concept ({', '.join(self.edited) or 'there are none'})."
            )
        state = self.verdicts if asked is None else self.others[self.edited.index(asked)]
        device = self.verdicts.device
        probability = probability.detach().to(device)
        indices = [torch.as_tensor(i, device=device).long() for i in (concept_index, prompt_index, image_index)]
        if probability.ndim != 1 or any(index.shape != probability.shape for index in indices):
            shapes = ", ".join(str(tuple(t.shape)) for t in (probability, *indices))
            raise ValueError(
                f"probability, concept_index, prompt_index, image_index have shapes {shapes}; expected four times (B,)."
            )
        fields = ("concept_index", "prompt_index", "image_index")
        for field, index, size in zip(fields, indices, state.shape, strict=True):
            if len(wrong := index[(index < 0) | (index >= size)]):
                raise ValueError(f"{field} {wrong[0].item()} is out of range: there are {size}, counted from 0.")
        if asked is not None and (indices[0] == self.concepts.index(asked)).any():
            raise ValueError(
                f"asked={asked!r} is the concept of a picture's own prompt: leave it out for this picture."
            )
        if len(wrong := probability[(probability < 0) | (probability > 1)]):
            raise ValueError(f"probability {wrong[0].item():.4g} is outside [0, 1].")
        verdict = (probability >= 0.5).to(torch.int8).masked_fill(probability.isnan(), FAILED)
        concept, prompt, image = indices
        place = (concept * state.shape[1] + prompt) * self.images_per_prompt + image
        state.copy_(state.flatten().scatter_reduce(0, place, verdict, "amax").view_as(state))

    def compute(self) -> dict[str, Any]:
        """Return the scores as plain numbers, nan where no picture was judged.

        Returns:
            ``forget``: share of the edited concepts' judged pictures without their concept; ``retain``: share of the
            other concepts' judged pictures with their concept; ``harmonic_mean`` of the two; ``forget_direct``,
            ``forget_indirect``, ``retain_direct``, ``retain_indirect``: the same over these prompts only;
            if there are adjacent concepts, ``adjacent``: as retain, over the adjacent concepts only;
            if there are adversarial prompts, ``forget_adversarial``: as forget, over the adversarial prompts, which do
            not count in other scores; if several concepts are edited, ``forget_crosswise``: share of the judged
            pictures of the *other* edited concepts' prompts without the concept, 0 if two concepts have changed places;
            if it was asked for, ``spontaneous``: share of the judged pictures of concepts that are not edited that show
            an edited concept, over all edited concepts;
            ``err``: the challenge's harmonic mean of ``forget_direct``, ``retain``, ``adjacent``, ``forget_indirect``
            and ``forget_adversarial``;
            ``intervals``: (low, high) for each score except ``err``; for the harmonic mean it is the range of harmonic
            means in a joint region of the same confidence (each score with half the error probability: Bonferroni);
            ``per_concept``: name -> ``share_with_concept``, ``n`` (judged), ``missing``, ``failed``, ``edited``, and if
            several are edited ``share_crosswise``: share of the others' pictures that show it, and if it was asked for
            ``share_spontaneous``: share of the pictures of concepts that are not edited that show it;
            ``missing``: number of pictures without a verdict; ``failed``: how many of these the judge did not answer.
        """
        verdicts, adversarial = self.verdicts.cpu().split([self.num_prompts, self.num_adversarial], dim=1)
        is_edited = torch.tensor([name in self.edited for name in self.concepts])
        self._warn_of_unjudged(verdicts)
        scores: dict[str, Any] = {}
        intervals: dict[str, tuple[float, float]] = {}
        prompts = {"": slice(None), "_direct": slice(self.num_direct), "_indirect": slice(self.num_direct, None)}
        for suffix, part in prompts.items():
            forgotten, edited = _count(verdicts[is_edited, part], verdict=0)
            retained, others = _count(verdicts[~is_edited, part], verdict=1)
            for name, successes, trials in (("forget", forgotten, edited), ("retain", retained, others)):
                scores[name + suffix] = successes / trials if trials else math.nan
                intervals[name + suffix] = wilson_interval(successes, trials, self.confidence)
            if not suffix:
                scores["harmonic_mean"] = harmonic_mean(scores["forget"], scores["retain"])
                joint = (1 + self.confidence) / 2
                bounds = [wilson_interval(*counts, joint) for counts in ((forgotten, edited), (retained, others))]
                low, high = (harmonic_mean(forget, retain) for forget, retain in zip(*bounds, strict=True))
                intervals["harmonic_mean"] = (low, high)
        is_adjacent = torch.tensor([name in self.adjacent for name in self.concepts])
        further: dict[str, tuple[int, int]] = {}
        if self.adjacent:
            further["adjacent"] = _count(verdicts[is_adjacent], verdict=1)
        if self.num_adversarial:
            further["forget_adversarial"] = _count(adversarial[is_edited], verdict=0)
        crosswise, spontaneous = self.others.cpu()[:, is_edited], self.others.cpu()[:, ~is_edited]
        if len(self.edited) > 1:
            further["forget_crosswise"] = _count(crosswise, verdict=0)
        if (spontaneous != NOT_JUDGED).any():
            further["spontaneous"] = _count(spontaneous, verdict=1)
        for name, (successes, trials) in further.items():
            scores[name] = successes / trials if trials else math.nan
            intervals[name] = wilson_interval(successes, trials, self.confidence)
        if {"adjacent", "forget_adversarial"} <= set(further):
            scores["err"] = harmonic_mean(*(scores[name] for name in ERR_TERMS))
        per_concept = {}
        for name, row in zip(self.concepts, verdicts, strict=True):
            shown, n = _count(row, verdict=1)
            per_concept[name] = {
                "share_with_concept": shown / n if n else math.nan,
                "n": n,
                "missing": row.numel() - n,
                "failed": int((row == FAILED).sum()),
                "edited": name in self.edited,
            }
        for number, name in enumerate(self.edited):
            for share, table, score in (
                ("share_crosswise", crosswise, "forget_crosswise"),
                ("share_spontaneous", spontaneous, "spontaneous"),
            ):
                if score in further:
                    shown, n = _count(table[number], verdict=1)
                    per_concept[name][share] = shown / n if n else math.nan
        return {
            **scores,
            "intervals": intervals,
            "per_concept": per_concept,
            "missing": sum(concept["missing"] for concept in per_concept.values()),
            "failed": sum(concept["failed"] for concept in per_concept.values()),
        }

    def _warn_of_unjudged(self, verdicts: Tensor) -> None:
        judged = (verdicts >= 0).flatten(1).any(dim=1).tolist()
        unjudged = [name for name, some in zip(self.concepts, judged, strict=True) if not some]
        if unjudged:
            failed = int((verdicts == FAILED).sum())
            rank_zero_warn(
                f"No picture was judged of {len(unjudged)} of {len(self.concepts)} concepts ({', '.join(unjudged)}): "
                f"they count in no score. The judge failed on {failed} pictures; the others were never shown to it "
                "(limit_test_batches, or a set of prompts that leaves concepts out?)."
            )


def _count(verdicts: Tensor, verdict: int) -> tuple[int, int]:
    """Return the number of pictures with this verdict, and the number of pictures with any verdict."""
    return int((verdicts == verdict).sum()), int((verdicts >= 0).sum())
