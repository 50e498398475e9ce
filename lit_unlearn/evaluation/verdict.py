"""What the scores of a run mean, in plain sentences: whether the concept is gone, and what went with it."""

from __future__ import annotations

from dataclasses import dataclass

from lit_unlearn.evaluation.scores import ConceptScore, Measurement, Scores

GONE = 0.9
"""Least share of the edited concept's pictures without it, for the concept to count as erased."""
LOSS = 0.05
"""Largest share of the other concepts' pictures that an edit may cost."""
HIT = 0.2
"""Loss from which on a single other concept is named."""
ROUNDING = 1e-9
"""How far shares may be off their limit because of floating point."""


@dataclass(frozen=True)
class Verdict:
    """Whether an edit did what was asked.

    Attributes:
        succeeded: The concept is erased and the others are kept.
        lines: The sentences that say so, with the numbers.
        gone: Whether the concept is erased; None if that was not judged.
        kept: Whether the others are kept; None if that was not judged.
    """

    succeeded: bool
    lines: list[str]
    gone: bool | None = None
    kept: bool | None = None


def verdict_of(scores: Scores) -> Verdict:
    """The verdict on a run, from its scores: ``GONE``, ``LOSS`` and ``HIT`` are its limits."""
    names = ", ".join(scores.edited)
    before, after = ([scores_.per_concept[name] for name in scores.edited] for scores_ in (_before(scores), scores))
    if scores.forget is None:
        return Verdict(False, [f"Not known: the judge {scores.judge} gave no answer about {names}."])
    shown = f"the edited model shows {names} on {_count(after)} pictures of its prompts, the unedited one on "
    shown += _count(before)
    gone = scores.forget >= GONE - ROUNDING
    lines = [f"{'Erased' if gone else 'Not erased'}: {shown} (judge: {scores.judge})."]
    loss, hit = _loss(scores)
    if scores.retain is None or loss is None:
        lines.append("Whether other concepts are kept was not judged.")
        return Verdict(gone, lines, gone)
    kept = loss <= LOSS + ROUNDING
    share = f"on {scores.retain:.1%} of their pictures, without the edit on {scores.retain + loss:.1%}"
    lines.append(f"{'Kept' if kept else 'Not kept'}: other concepts are {share}.")
    if hit:
        lines.append(f"Hit most: {', '.join(hit)}.")
    return Verdict(gone and kept, lines, gone, kept)


def _before(scores: Scores) -> Measurement:
    return scores.before or scores


def _count(found: list[ConceptScore]) -> str:
    shown = sum(round((one.share_with_concept or 0) * one.n) for one in found)
    return f"{shown} of {sum(one.n for one in found)}"


def _loss(scores: Scores) -> tuple[float | None, list[str]]:
    """How much of the others' pictures the edit costs, and the concepts that lose most, with their shares."""
    before = _before(scores)
    if scores.retain is None or before.retain is None:
        return None, []
    lost = []
    for name, own in scores.per_concept.items():
        share, earlier = own.share_with_concept, before.per_concept[name].share_with_concept
        if not own.edited and share is not None and earlier is not None and earlier - share > HIT:
            lost.append((earlier - share, f"{name} ({earlier:.0%} -> {share:.0%})"))
    return before.retain - scores.retain, [text for _, text in sorted(lost, reverse=True)]
