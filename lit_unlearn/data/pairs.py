"""The pairs of an edit of several concepts, repaired: no pair keeps or brings back what another pair removes.

    repaired(edited, concepts) -> the edited concepts, with the pairs, targets and anchors that a fit should use

Two things go wrong when the pairs of a set are used as they are. "An apple at sunset" -> "a lemon at sunset" keeps the
sunset that another pair removes; such pairs are left out. And "surfing" becomes "walking" while walking is edited too:
the concept is renamed, not removed. Such targets are followed to a concept that is not edited (surfing -> walking ->
standing); where they go round in a circle (rain -> sunset -> rain), another concept of the same kind takes their place.
Target prompts are reworded for it, with the phrases of the set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.data.names import find_names, read, replace_spans

ARTICLES = ("a", "an", "the")
PREPOSITIONS = (
    *("as", "at", "by", "drawn", "during", "from", "front", "in", "like", "of", "on", "that", "under", "when"),
    *("while", "who", "with"),
)
"""Words before a name that belong to its phrase: "drawn as a cartoon", "in front of rain", "the man who surfs"."""
FEW_PAIRS = 6
"""A concept with fewer pairs left gets more, in which other edited concepts are replaced by their targets."""
ATTRIBUTES = ("style", "scene")
"""Kinds of concepts without which a picture is still a picture, so that their phrase can be left out."""


@dataclass(frozen=True)
class Target:
    """What an edited concept becomes.

    Attributes:
        name: Name of a concept of the set that is not edited, free text, or "" to leave the concept's phrase out.
        owner: The edited concept whose ``target`` this is; None if the set's own concept ``name`` was chosen.
    """

    name: str
    owner: Concept | None


def repaired(edited: Sequence[Concept], concepts: ConceptSet) -> list[Concept]:
    """``edited`` with the pairs that an edit of all of them should use; a single concept is returned as it is.

    Pairs whose edit prompt names another edited concept are left out. If fewer than ``FEW_PAIRS`` of a concept are
    left, some come back with other words: "a cartoon daisy" as "a cartoon tulip", if daisies become tulips. If there is
    none at all, all stay, and their target prompts get the targets of all the concepts that they name. Targets, anchors
    and target prompts that name an edited concept are replaced; see ``resolved_target``.

    Args:
        edited: Concepts of ``concepts``.
        concepts: The set.
    """
    if len(edited) == 1:
        return list(edited)
    targets = {concept.name: resolved_target(concept, edited, concepts) for concept in edited}
    return [_repaired(concept, edited, concepts, targets) for concept in edited]


def resolved_target(concept: Concept, edited: Sequence[Concept], concepts: ConceptSet) -> Target:
    """What ``concept`` becomes when all of ``edited`` are: the first of these that exists.

    1. Its target, or the target of its target and so on, that does not name an edited concept.
    2. In a circle: a concept of the same kind that is not edited, an adjacent one if there is one.
    3. Such a target of another edited concept of the same kind, an adjacent one if there is one.
    4. Nothing, for a style or a scene: a picture without it.
    5. Its own target, as the set has it.
    """
    if (found := _followed(concept, edited)) is not None:
        return found
    near = [concepts.concepts[name] for name in concept.adjacent]
    same_kind = [c for c in (*near, *concepts.concepts.values()) if c.kind == concept.kind and c is not concept]
    names = {c.name for c in edited}
    for other in same_kind:
        if other.name not in names:
            return Target(other.name, None)
    for other in same_kind:
        if other.name in names and (found := _followed(other, edited)) is not None:
            return found
    return Target("" if concept.kind in ATTRIBUTES else concept.target, None if concept.kind in ATTRIBUTES else concept)


def edited_into(earlier: Sequence[Concept], new: Sequence[Concept], concepts: ConceptSet) -> list[Concept]:
    """Those of ``earlier`` that became one of ``new``: if cats go now, so must the cats that dogs have become.

    Args:
        earlier: Concepts that were edited one after the other, in this order, each time with those that had become it.
        new: Concepts that are edited now.
        concepts: Their set.
    """
    became: dict[str, str] = {}
    for number, concept in enumerate(earlier, 1):
        again = [name for name, target in became.items() if concept.find_name(target)]
        for own in earlier[:number]:
            if own is concept or own.name in again:
                became[own.name] = resolved_target(own, earlier[:number], concepts).name
    return [concept for concept in earlier if _named(became[concept.name], new)]


def said_of(edited: Sequence[Concept], made: Sequence[Concept]) -> str:
    """What ``repaired`` changed when it made ``made`` of ``edited``, in a sentence or two; "" for nothing."""
    said = []
    before, after = ([set(concept.edit_prompts) for concept in concepts] for concepts in (edited, made))
    if dropped := sum(len(old - new) for old, new in zip(before, after, strict=True)):
        count = sum(len(concept.edit_prompts) for concept in edited)
        said.append(f"{dropped} of {count} pairs name another edited concept and are left out.")
    if added := {own.name: len(new - old) for own, old, new in zip(made, before, after, strict=True) if new - old}:
        said.append(
            f"{', '.join(added)} would keep fewer than {FEW_PAIRS}: {sum(added.values())} come back with the targets "
            "of the other concepts that they name."
        )
    new = [
        f"{old.name} \u2192 {own.target or 'nothing'} (not {old.target})"
        for old, own in zip(edited, made, strict=True)
        if own.target != old.target
    ]
    if new:
        said.append(f"Targets that are edited too are replaced: {', '.join(new)}.")
    return " ".join(said)


def _followed(concept: Concept, edited: Sequence[Concept]) -> Target | None:
    """The end of the chain of targets that begins at ``concept``; None if it is a circle."""
    seen = [concept]
    while (after := _named(seen[-1].target, edited)) is not None:
        if after in seen:
            return None
        seen.append(after)
    return Target(seen[-1].target, seen[-1])


def _named(text: str, concepts: Sequence[Concept]) -> Concept | None:
    return next((concept for concept in concepts if concept.find_name(text)), None)


def _repaired(concept: Concept, edited: Sequence[Concept], concepts: ConceptSet, targets: dict[str, Target]) -> Concept:
    others = [other for other in edited if other is not concept]
    target = targets[concept.name]
    rewords = target.name != concept.target
    phrases = phrases_of(target, concepts)
    pairs = []
    for text, into in zip(concept.edit_prompts, concept.target_prompts, strict=True):
        leads_on = any(other.find_name(into) and not other.find_name(text) for other in others)
        if rewords or leads_on:
            into = renamed(into, others, target.name, concept.kind) or reworded(text, into, concept, phrases)
        pairs.append((text, into))
    kept = [(text, into) for text, into in pairs if _named(text, others) is None]
    if len(kept) < FEW_PAIRS:
        freed = ((_freed(text, others, targets), _freed(into, others, targets)) for text, into in pairs)
        kept += [pair for pair in freed if all(pair) and pair not in kept][: FEW_PAIRS - len(kept)]
    if not kept:
        rank_zero_warn(
            f"Every edit prompt of {concept.name} names another edited concept, so all stay, with the targets of "
            f"both; edit prompts that name {concept.name} alone would serve it better."
        )
        kept = [(text, _without(into, others, targets)) for text, into in pairs]
    anchor = concept.anchor
    if rewords and (spans := find_names(anchor, [concept.target])):
        anchor = reworded(replace_spans(anchor, spans, concept.names[0]), anchor, concept, phrases) or "a picture"
    return replace(
        concept,
        target=target.name,
        anchor=anchor,
        edit_prompts=tuple(text for text, _ in kept),
        target_prompts=tuple(into for _, into in kept),
    )


def _without(text: str, others: Sequence[Concept], targets: dict[str, Target]) -> str:
    for other in others:
        text = other.replace_names(text, targets[other.name].name)
    return " ".join(text.split())


# --- rewording


@dataclass(frozen=True)
class Phrase:
    """Words that name something in a prompt.

    Attributes:
        before: The articles and prepositions that belong to it: "in front of an".
        words: The rest: "aurora".
    """

    before: tuple[str, ...]
    words: tuple[str, ...]


def phrases_of(target: Target, concepts: ConceptSet) -> list[Phrase]:
    """How the prompts of ``concepts`` name ``target``, with articles and prepositions; empty for no target.

    If they do not, it is the name alone.
    """
    if not target.name:
        return []
    own = target.owner or concepts.get(target.name)
    found = []
    for text, into in zip(own.edit_prompts, own.target_prompts, strict=True):
        prompt, other = (text, into) if target.owner is None else (into, text)
        _, phrase, _ = split(prompt, other, own.kind)
        if read(" ".join(phrase.words)).letters == read(target.name).letters:
            found.append(phrase)
    return list(dict.fromkeys(found)) or [Phrase((), tuple(target.name.split()))]


def _freed(text: str, others: Sequence[Concept], targets: dict[str, Target]) -> str:
    """``text`` with their targets in place of the objects and actions among ``others`` that it names.

    "" if it names a style or a scene among them, of which more than the name would have to change, or if a target is
    edited too.
    """
    while (other := _named(text, others)) is not None:
        name = targets[other.name].name
        text = "" if other.kind in ATTRIBUTES or _named(name, others) else _put(name, other, text)
    return text


def renamed(into: str, others: Sequence[Concept], name: str, kind: str) -> str:
    """``into`` with ``name`` in place of the only one of ``others`` that it names; "" if that makes no sentence.

    It does for objects and actions: "a boy walking through the park", "a boy sitting through the park".
    """
    named = [other for other in others if other.find_name(into)]
    if kind in ATTRIBUTES or len(named) != 1 or not name:
        return ""
    return _put(name, named[0], into)


def _put(name: str, other: Concept, text: str) -> str:
    """``text`` with ``name`` in place of the names of ``other``, and the article that belongs to it."""
    article = "an" if name[0].casefold() in "aeiou" else "a"
    return re.sub(rf"\ban? (?={re.escape(name)}\b)", f"{article} ", other.replace_names(text, name))


def reworded(text: str, into: str, concept: Concept, phrases: Sequence[Phrase]) -> str:
    """``into`` with one of ``phrases`` in place of the words in which it differs from ``text``.

    Args:
        text: An edit prompt of ``concept``.
        into: Its target prompt.
        concept: The edited concept.
        phrases: Phrases of the new target; empty to leave the words out.
    """
    start, old, end = split(into, text, concept.kind, is_description=concept.find_name(text) is None)
    if not phrases:
        return " ".join((*start, *_article_before(end, old, concept.kind), *end))

    # The same preposition or article fits best, else one that begins alike, else any.
    def fit(phrase: Phrase) -> tuple[bool, bool, bool]:
        return phrase.before == old.before, phrase.before[:1] == old.before[:1], bool(phrase.before) == bool(old.before)

    best = max(phrases, key=fit)
    return " ".join((*start, *(best.before if old.before else ()), *best.words, *end))


def _article_before(end: Sequence[str], old: Phrase, kind: str) -> list[str]:
    """The article that ``end`` needs once ``old``, which stood before its noun, is left out: "an ink sketch man"."""
    stands_free = not end or end[0] in (*ARTICLES, *PREPOSITIONS)
    if kind not in ATTRIBUTES or stands_free or old.before[-1:] not in (("a",), ("an",)):
        return []
    return ["an" if end[0][0].casefold() in "aeiou" else "a"]


def split(
    text: str, other: str, kind: str, is_description: bool = False
) -> tuple[tuple[str, ...], Phrase, tuple[str, ...]]:
    """Split ``text`` into the words before, in and after the phrase in which it differs from ``other``.

    For an object, an article before the words that differ belongs to the phrase. For a style or a scene so do articles
    and prepositions, unless the phrase stands before a noun ("a cartoon dog"), and the word "style" after it.

    Args:
        text: A prompt.
        other: The prompt of the same pair.
        kind: Kind of the concept that the pair edits.
        is_description: Whether the pair describes the concept without naming it. Then the phrase begins earlier, for an
            object with the article ("the furry pal that ..."), for an action after its subject, and it ends before the
            next preposition.
    """
    words, theirs = text.split(), other.split()
    shortest = min(len(words), len(theirs))
    first = 0
    while first < shortest and words[first] == theirs[first]:
        first += 1
    last = 0
    while last < shortest - first and words[-1 - last] == theirs[-1 - last]:
        last += 1
    end = len(words) - last
    if kind in ATTRIBUTES and words[end : end + 1] == ["style"]:
        end += 1
    if is_description:
        while end < len(words) and words[end] not in (*ARTICLES, *PREPOSITIONS):
            end += 1
    stands_free = end == len(words) or words[end] in (*ARTICLES, *PREPOSITIONS)
    begin = first
    if is_description and kind == "object" and (articles := [i for i in range(first) if words[i] in ARTICLES]):
        begin = articles[-1]
    elif kind in ATTRIBUTES or is_description:
        while stands_free and begin > 0 and words[begin - 1] in (*ARTICLES, *PREPOSITIONS):
            begin -= 1
    elif kind == "object" and begin > 0 and words[begin - 1] in ARTICLES:
        begin -= 1
    inside = begin
    while inside < end - 1 and words[inside] in (*ARTICLES, *PREPOSITIONS):
        inside += 1
    return tuple(words[:begin]), Phrase(tuple(words[begin:inside]), tuple(words[inside:end])), tuple(words[end:])
