"""The verdict of a report on a method: whether its edits erased what they should, and what attacks brought back."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.evaluation.verdict import GONE, LOSS, verdict_of
from lit_unlearn.reports.attack_results import AttackResult, attack_words
from lit_unlearn.reports.attack_tables import by_label

LIMITS = (
    f"Erased: at least {GONE:.0%} of the pictures of the edited prompts do not show their concept. Kept: the share of "
    f"the other concepts' pictures that show theirs is at most {100 * LOSS:.0f} percentage points lower than without "
    "the edit. A failed attack proves nothing."
)
"""What the words of a verdict mean."""


def of(number: int, noun: str) -> str:
    """``1 concept``, ``2 concepts``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def method_verdict(method: str, runs: Sequence[Scores], attacks: Sequence[AttackResult]) -> str:
    """The verdict on a method, in a few sentences.

    Args:
        method: Its name.
        runs: Scores of its runs, at least one.
        attacks: Results of the attacks on them.
    """
    verdicts = [verdict_of(run) for run in runs]
    good = sum(verdict.succeeded for verdict in verdicts)
    if len(runs) == 1:
        sentences = verdicts[0].lines
    else:
        sentences = [f"erased, and the others kept, in {good} of {of(len(runs), 'run')}."]
        for what, flags in (
            ("Not erased", [verdict.gone is False for verdict in verdicts]),
            ("Others not kept", [verdict.kept is False for verdict in verdicts]),
            ("Not judged", [verdict.gone is None for verdict in verdicts]),
        ):
            counts: dict[str, int] = {}
            for run, flag in zip(runs, flags, strict=True):
                counts["+".join(run.edited)] = counts.get("+".join(run.edited), 0) + flag
            named = [name if n == 1 else f"{name} ({n} runs)" for name, n in counts.items() if n]
            sentences += [f"{what}: {', '.join(named)}."] if named else []
    shown = {label: fmean(result.shown for result in results) for label, results in by_label(attacks).items()}
    if not shown:
        sentences = [*sentences, "Not attacked."]
    else:
        label = max(shown, key=lambda name: shown[name])
        which = f"The most successful of {len(shown)} attacks" if len(shown) > 1 else "The attack"
        found = f"{attack_words(label)}, shows the concept on {shown[label]:.0%} of the pictures."
        sentences = [*sentences, f"{which}, {found}"]
    return f"{method}: {' '.join(sentences)}"
