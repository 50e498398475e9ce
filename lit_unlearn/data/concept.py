"""One concept of a concept set: its names, its prompts and the pairs of prompts that edit it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lit_unlearn.data.names import Span, find_names, replace_spans


@dataclass(frozen=True)
class PromptCounts:
    """Prompts per concept; the defaults are the paper's. A set can set other numbers in ``prompts_per_concept``.

    A set without indirect prompts has ``indirect: 0``.
    """

    direct: int = 5
    indirect: int = 5
    edit: int = 15


@dataclass(frozen=True)
class Concept:
    """One concept: its names, its evaluation prompts and the prompt pairs that edit it.

    Attributes:
        name: Name of the concept, unique in its set.
        kind: One of ``KINDS``.
        names: Words or phrases that name the concept; ``lit_unlearn.data.names`` finds them in prompts.
        target: What the concept becomes: the name of another concept, or free text.
        anchor: Prompt of the broader or related concept that Concept Ablation maps it to.
        question: Question to a judge; "yes" means that the picture shows the concept.
        direct: Evaluation prompts that name the concept.
        indirect: Evaluation prompts that describe the concept without naming it.
        edit_prompts: E, prompts that show the concept.
        target_prompts: E*, ``edit_prompts`` with the concept replaced by its target, in the same order.
        adjacent: Names of the set's concepts that are nearest in meaning; an edit damages them most easily.
        adversarial: Evaluation prompts that look like gibberish.
        longer_names: Names of other concepts of the set that contain one of this concept's names; filled in by the set.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    target: str
    anchor: str
    question: str
    direct: tuple[str, ...]
    indirect: tuple[str, ...]
    edit_prompts: tuple[str, ...]
    target_prompts: tuple[str, ...]
    adjacent: tuple[str, ...] = ()
    adversarial: tuple[str, ...] = ()
    longer_names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Evaluation prompts of the paper's protocol: the direct ones, then the indirect ones."""
        return self.direct + self.indirect

    def occurrences(self, text: str) -> list[Span]:
        """Where ``text`` names the concept, from left to right: start and end of each place, the end not included.

        See ``lit_unlearn.data.names`` for how names are read. A part of a longer name of another concept of the set
        does not count.
        """
        found = find_names(text, self.names)
        others = find_names(text, self.longer_names) if found else []
        return [
            own
            for own in found
            if not any(other != own and other[0] <= own[0] and own[1] <= other[1] for other in others)
        ]

    def find_name(self, text: str) -> str | None:
        """Return the first whole word or phrase of ``text`` that names the concept, as it is written there, or None."""
        return next((text[start:end] for start, end in self.occurrences(text)), None)

    def replace_names(self, text: str, replacement: str) -> str:
        """Return ``text`` with ``replacement`` in place of every word or phrase that names the concept."""
        return replace_spans(text, self.occurrences(text), replacement)

    def content(self) -> dict[str, Any]:
        """The concept's name and its fields in the file."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.compare}
