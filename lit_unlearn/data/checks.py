"""Checks of a concept set when it is loaded: everything that an edit and its evaluation rely on."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.data.names import name_key, read
from lit_unlearn.system.names import is_text

if TYPE_CHECKING:
    from lit_unlearn.data.concepts import Concept, ConceptSet


def concept_error(path: Path, concept: str, field_name: str, problem: str) -> ValueError:
    """An error with one sentence about a field of a concept."""
    return ValueError(f"{path}: concept {concept!r}, field {field_name!r}: {problem}.")


def check_concept_set(concepts: ConceptSet) -> None:
    """Check everything that an edit and its evaluation rely on.

    Raises:
        ValueError: The set is wrong; the message has the first problem, with file, concept and field.
    """
    keys: dict[str, str] = {}
    for name in concepts.concepts:
        if not is_text(name):
            raise ValueError(f"{concepts.path}: the concept {name!r} is empty or holds control characters; rename it.")
        if (other := keys.setdefault(name_key(name), name)) != name:
            raise ValueError(f"{concepts.path}: the concepts {other!r} and {name!r} have the same name; rename one.")
    for concept in concepts.concepts.values():
        _check_concept(concepts, concept)
    _check_unique(concepts)


def _check_concept(concepts: ConceptSet, concept: Concept) -> None:
    def fail(field_name: str, problem: str) -> ValueError:
        return concept_error(concepts.path, concept.name, field_name, problem)

    if not concept.names:
        raise fail("names", "is empty; list at least one word or phrase that names the concept")
    if unread := [name for name in concept.names if not name_key(name)]:
        raise fail("names", f"{unread[0]!r} has nothing that can be read; give a word or a phrase")
    if name_key(concept.target) in {name_key(name) for name in (concept.name, *concept.names)}:
        raise fail("target", f"{concept.target!r} is the concept itself; choose another concept to edit it into")
    if found := concept.find_name(concept.anchor):
        raise fail("anchor", f"{concept.anchor!r} names the concept ({found!r}); choose an anchor that does not")
    if len(concept.edit_prompts) != len(concept.target_prompts):
        raise fail(
            "target_prompts",
            f"{len(concept.edit_prompts)} edit prompts but {len(concept.target_prompts)} target prompts; "
            "each edit prompt needs its target prompt at the same place",
        )
    counts = concepts.counts
    for field_name, expected in (
        ("direct", counts.direct),
        ("indirect", counts.indirect),
        ("edit_prompts", counts.edit),
    ):
        if (number := len(getattr(concept, field_name))) != expected:
            raise fail(field_name, f"{number} prompts where {expected} are due (prompts_per_concept)")
    for prompt in concept.direct:
        if not concept.find_name(prompt):
            raise fail("direct", f"{prompt!r} contains none of the concept's names ({', '.join(concept.names)})")
    for field_name in ("indirect", "target_prompts"):
        for prompt in getattr(concept, field_name):
            if found := concept.find_name(prompt):
                raise fail(field_name, f"{prompt!r} names the concept ({found!r}); reword it")
    for prompt, target_prompt in zip(concept.edit_prompts, concept.target_prompts, strict=True):
        if read(prompt).letters == read(target_prompt).letters:
            raise fail("target_prompts", f"{target_prompt!r} equals its edit prompt, so that it would edit nothing")
    for name in concept.adjacent:
        if name not in concepts.concepts:
            close = get_close_matches(name, concepts.concepts)
            remedy = f"closest names: {', '.join(close)}" if close else "name concepts of this set"
            raise fail("adjacent", f"{name!r} is not in the set; {remedy}")
        if name == concept.name:
            raise fail("adjacent", f"{name!r} is the concept itself; name other concepts of the set")


def _check_unique(concepts: ConceptSet) -> None:
    """Check that every direct, indirect, adversarial and edit prompt occurs only once in the whole set.

    Target prompts may repeat, because several concepts may share a target and use its prompts. Prompts of ``retain``
    may repeat edit prompts, but must not be judged.
    """
    places: dict[tuple[str, bool], str] = {}  # key: the prompt as it is read, and whether it is an edit prompt
    written: dict[str, str] = {}
    for concept in concepts.concepts.values():
        for field_name in ("direct", "indirect", "adversarial", "edit_prompts"):
            for prompt in getattr(concept, field_name):
                is_edit, here = field_name == "edit_prompts", f"in {field_name!r} of {concept.name!r}"
                if other := places.get((read(prompt).letters, not is_edit)):
                    kind = "an evaluation" if is_edit else "an edit"
                    reason = f"is {kind} prompt, {other}; an edit must not see what it is judged on"
                    raise concept_error(concepts.path, concept.name, field_name, f"{prompt!r} {reason}")
                key = " ".join(prompt.casefold().split())
                if other := written.get(key):
                    reason = f"is a duplicate: it occurs {other} already"
                    raise concept_error(concepts.path, concept.name, field_name, f"{prompt!r} {reason}")
                written[key] = here
                places.setdefault((read(prompt).letters, is_edit), here)
    for prompt in concepts.retain:
        if (place := places.get((read(prompt).letters, False))) is not None:
            raise ValueError(
                f"{concepts.path}: field 'retain': {prompt!r} is an evaluation prompt, {place}: an edit must not see "
                "what it is judged on, so take it out."
            )
