"""Concept sets for the embedded models, made of a name: they know few words, so that general sentences say nothing.

``emoji_set("parrot", "owl")`` is ``emoji20`` with the concept that it lacks. Its prompts have the form of those of
``emoji20``: a frame, a phrase of ``phrases.yaml``, and a style or scene where one is wanted. The first five
descriptions are judged (``indirect``), the last four are for the edit. A concept of ``emoji20`` keeps its prompts if
its target stays the same. A style or a scene with another target keeps all but the target prompts, which get the
phrases of that target at the same places of ``phrases.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_unlearn.data.checks import check_concept_set
from lit_unlearn.data.concepts import Concept, ConceptSet, concept_set_of, load_concept_set
from lit_unlearn.data.names import bare, name_key, read
from lit_unlearn.emoji.captions import phrases

DIRECT = (
    *("an image of {0}", "look at {1} drawn as a sketch during an aurora", "{2}", "a picture of {1} as pixel art"),
    *("here is {0} at sunset", "we see {2} in the rain", "a nice picture of {0} in front of neon signs"),
)
INDIRECT = (
    *("a nice picture of {3}", "a picture of {4} as a cartoon", "an image of {5}", "look at {6} in front of rain"),
    *("here is {7}",),
)
NAMED = (
    *("we see {1}", "this is {0} as a cartoon", "look at {1}", "an image of {2} on plain paper", "a picture of {0}"),
    *("look at {1} as pixel art in front of a sunset", "here is {2}", "there is {0}", "this is {2} at sunset"),
    *("an image of {1} as a glossy render", "a nice picture of {2} drawn as a cartoon", "{0} as pixel art"),
)
DESCRIBED = (
    *("an image of {8}", "{9}", "a picture of {10} in front of an aurora", "a nice picture of {11}", "look at {8}"),
    *("{9} drawn as a glossy render", "we see {10}"),
)
"""Sentences with places for the three direct phrases of a subject (0 to 2) and its nine descriptions (3 to 11)."""
ACTIONS = ("dancing", "standing", "walking", "surfing", "sleeping")


def known_concepts() -> dict[str, str]:
    """The attribute (``subject``, ``style``, ``scene``) of everything that the embedded models draw, by its name."""
    return {value: attribute for attribute, values in phrases().items() for value in values}


def find_known(name: str, option: str) -> str:
    """The name of what ``name`` stands for in ``known_concepts``.

    Raises:
        ValueError: The embedded models do not draw it.
    """
    by_key = {name_key(value): value for value in known_concepts()}
    if (found := by_key.get(name_key(bare(name)))) is None:
        why = "so there is nothing to erase" if option == "concept" else "so it can neither draw nor retain that"
        raise ValueError(
            f"{option}={name!r}: the embedded model does not draw it, {why}; it draws {', '.join(known_concepts())}. "
            "For another model give --model."
        )
    return found


def emoji_set(
    name: str,
    target: str | None,
    path: Path,
    protect: Sequence[str] = (),
    retain: Sequence[str] = (),
    prompts: Sequence[str] = (),
    questions: Mapping[str, str] | None = None,
) -> tuple[ConceptSet, str]:
    """``emoji20`` with the concept ``name``, which becomes ``target``.

    Args:
        name: Something that the embedded models draw.
        target: What it becomes, of the same attribute; None for the target in ``emoji20``.
        path: Where the set will be written; errors name it.
        protect: Further things that they draw, to count as neighbours.
        retain: The user's own prompts to retain.
        prompts: The user's own prompts of the concept, to be judged too.
        questions: The judge's questions by name, for concepts that are not in ``emoji20``.

    Returns:
        The set, and the concept's name in it.

    Raises:
        ValueError: The models do not draw one of them, or they do not fit together.
    """
    base, known = load_concept_set("emoji20"), known_concepts()
    own = find_known(name, "concept")
    if target is None:
        if own not in base.concepts:
            raise ValueError(f"concept={name!r} has no target of its own: say with --to what to draw in its place.")
        target = base.concepts[own].target
    into = find_known(target, "to")
    if into == own:
        raise ValueError(f"to={target!r} is the concept itself: name what to draw in its place.")
    if known[into] != known[own]:
        raise ValueError(
            f"to={target!r} is a {known[into]}, but {own} is a {known[own]}: name another {known[own]}, such as "
            f"{next(value for value, kind in known.items() if kind == known[own] and value not in (own, 'plain'))}."
        )
    near = [find_known(one, "protect") for one in protect]
    if own in near:
        raise ValueError(f"protect={own!r} is what is to be erased: protect something else.")
    concepts = dict(base.concepts)
    for further in dict.fromkeys((own, *near)):
        if further not in concepts or (further == own and concepts[own].target != into):
            to = into if further == own else next(v for v in known if known[v] == known[further] and v != further)
            taken = [other for other in concepts.values() if other.name != further]
            concepts[further] = _made(further, to, base, taken, questions or {})
    adjacent = [*dict.fromkeys((*near, *concepts[own].adjacent))]
    concepts[own] = replace(concepts[own], adjacent=tuple(adjacent), adversarial=(*concepts[own].adversarial, *prompts))
    made = ConceptSet("erase", concepts, path, base.counts, tuple(retain))
    for prompt in retain:
        if concepts[own].find_name(prompt):
            raise ValueError(f"retain has {prompt!r}, which names what is to be erased ({own}): take it out.")
    check_concept_set(made)
    return concept_set_of(made.content(), path), own


def _made(name: str, target: str, base: ConceptSet, others: Sequence[Concept], questions: Mapping[str, str]) -> Concept:
    attribute = known_concepts()[name]
    if attribute != "subject":
        return _reworded(name, target, base)
    own, theirs = (
        [text for key in ("direct", "indirect") for text in phrases()["subject"][value][key]]
        for value in (name, target)
    )
    taken = {read(p).letters for c in others for p in (*c.direct, *c.indirect, *c.adversarial, *c.edit_prompts)}

    def free(sentences: Sequence[str], number: int) -> list[str]:
        return [text for text in sentences if read(text.format(*own)).letters not in taken][:number]

    edit = [*free(NAMED, 15 - len(DESCRIBED)), *free(DESCRIBED, len(DESCRIBED))]
    fields: dict[str, Any] = (
        base.concepts[name].content() if name in base.concepts else {"name": name, "names": (name,)}
    )
    article = own[0].split()[0]
    return Concept(
        name=name,
        kind="action" if name in ACTIONS else "object",
        names=tuple(fields["names"]),
        target=target,
        anchor=theirs[0],
        question=fields.get("question") or questions.get(name) or f"Is there {article} {name} in this picture?",
        direct=tuple(text.format(*own) for text in free(DIRECT, 5)),
        indirect=tuple(text.format(*own) for text in free(INDIRECT, 5)),
        edit_prompts=tuple(text.format(*own) for text in edit),
        target_prompts=tuple(text.format(*theirs) for text in edit),
        adjacent=tuple(fields.get("adjacent", ())),
        adversarial=tuple(fields.get("adversarial", ())),
    )


def _reworded(name: str, target: str, base: ConceptSet) -> Concept:
    """The style or scene ``name`` of ``emoji20`` with another target.

    Raises:
        ValueError: ``emoji20`` does not have one of the two.
    """
    for option, value in (("concept", name), ("to", target)):
        if value not in base.concepts:
            raise ValueError(f"{option}={value!r} is what pictures have without a style or a scene: name another.")
    concept, attribute = base.concepts[name], known_concepts()[name]
    own, theirs = phrases()[attribute][name], phrases()[attribute][target]
    pairs = [pair for key, texts in own.items() for pair in zip(texts, theirs[key], strict=False)]
    pairs.sort(key=lambda pair: -len(pair[0]))  # "ink sketch" before "sketch"
    return replace(
        concept,
        target=target,
        anchor=f"a picture {theirs['direct'][0]}",
        target_prompts=tuple(_exchanged(text, pairs) for text in concept.edit_prompts),
    )


def _exchanged(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """``text`` with the second phrase of a pair in the place of the first, and the article that it needs."""
    for phrase, other in pairs:
        if found := re.search(rf"\b(?:(an?) )?{re.escape(phrase)}\b", text):
            article = ("an " if other[0] in "aeiou" else "a ") if found[1] else ""
            return f"{text[: found.start()]}{article}{other}{text[found.end() :]}"
    raise AssertionError(f"{text!r} has none of its concept's phrases")
