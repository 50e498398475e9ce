"""Concept sets that are made of a name: sentences by kind, for people who have a concept in mind and no prompts.

Data flow of ``lit-unlearn erase "Mickey Mouse" --to "a cartoon mouse" --kind character --protect "Minnie Mouse"``:

    templates.yaml --sentences of the kind--> written(...)        one concept: edit, target and direct prompts
                   --others, retain-------->  set_of(...)         with neighbours and the user's prompts: a ConceptSet
    ConceptSet.content() --> concepts.yaml --> the recipe, which fit, test and every later command read

A kind has two lists of sentences that share none: ``edit`` (an edit prompt has the concept's phrase, its target prompt
the target's) and ``direct`` (only judged). A sentence that names the concept itself is left out and a spare one takes
its place: "{} on a table" for a table. There are no indirect prompts, since a program cannot describe a concept from
its name; a set like this has ``indirect: 0``.

Retained are: general concepts, which are also judged; ``protect``, neighbours of the same kind that the user names,
which are judged and count as ``adjacent``; general sentences, and the user's own ``retain``, which are not judged.

Phrases are as the user writes them. Only an object in lower case gets an article by itself: "dog" becomes "a dog".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_unlearn.data.concepts import Concept, ConceptSet, concept_set_of
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.data.names import ARTICLES, bare, find_names, name_key
from lit_unlearn.system.strict_yaml import load_yaml

EDIT, DIRECT = 15, 10
"""Edit prompts and direct prompts of a concept."""
DETERMINERS = {*ARTICLES, "some", "any", "my", "your", "his", "her", "their", "our", "this", "that", "these", "those"}
DETERMINERS |= {"one", "two", "three", "four", "five", "many", "several", "no"}
VOWEL_SOUND = re.compile(r"(?!uni(?![mn])|us[aeu]|ut[ei]|eu|ewe|one\b|once\b)[aeiou]|hour|honest|hono|heir")
"""How words begin that take "an"."""


@dataclass(frozen=True)
class Wish:
    """A concept to write prompts for.

    Attributes:
        name: Its name as people write it, with or without an article.
        target: What it becomes.
        kind: One of ``KINDS``.
        also: Further words that name it.
        question: Question to the judge; None takes the kind's.
        prompts: Prompts of the user's own that are drawn and judged too; stored as ``adversarial``.
        adjacent: Names of other concepts of the set that are nearest to it.
    """

    name: str
    target: str
    kind: str = "object"
    also: tuple[str, ...] = ()
    question: str | None = None
    prompts: tuple[str, ...] = ()
    adjacent: tuple[str, ...] = field(default=(), compare=False)


@cache
def templates() -> Mapping[str, Any]:
    """The content of ``templates.yaml``."""
    source = files(__package__) / "templates.yaml"
    content = load_yaml(source.read_bytes(), Path(str(source)))
    assert isinstance(content, dict)
    return content


def phrase_of(name: str, kind: str) -> str:
    """How a sentence names a thing called ``name``.

    An object gets "a" or "an" if its name is one in lower case, of letters that have one, that begins with no article
    or number and does not look like a plural.
    """
    text = " ".join(name.split())
    words = text.split()
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    is_plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us", "is"))
    if kind != "object" or not re.match("[a-z]", plain) or words[0] in DETERMINERS or is_plural:
        return text
    return f"{'an' if VOWEL_SOUND.match(plain) else 'a'} {text}"


def split_names(texts: Sequence[str], option: str = "protect") -> list[str]:
    """The names in ``texts``, which are separated by commas of any script.

    Raises:
        ValueError: A name is empty.
    """
    names = [name.strip() for text in texts for name in re.split(r"[,;\uff0c\uff1b\u3001\u060c]", text)]
    if "" in names:
        raise ValueError(f"{option}={', '.join(texts)!r} has an empty name: write names with one comma between them.")
    return list(dict.fromkeys(names))


def check_wish(wish: Wish, option: str = "concept") -> None:
    """Refuse a name, a target or a kind of which no concept can be made.

    Raises:
        ValueError: The message names the option, its value and the remedy.
    """
    if wish.kind not in KINDS:
        raise ValueError(f"kind={wish.kind!r} is not one of {', '.join(KINDS)}.")
    for key, value in ((option, wish.name), ("to", wish.target), *(("also", name) for name in wish.also)):
        if not name_key(bare(value)):
            raise ValueError(f"{key}={value!r} has nothing that can be read: give a word or a phrase.")
    names = (bare(wish.name), *wish.also)
    if name_key(bare(wish.target)) in map(name_key, names):
        raise ValueError(f"to={wish.target!r} is the concept itself: name what to draw in its place.")
    if find_names(wish.target, names):
        raise ValueError(f"to={wish.target!r} names the concept {bare(wish.name)!r}: choose words without its name.")


def written(wish: Wish) -> dict[str, Any]:
    """The fields of a concept in a concept set (``docs/concept_sets.md``), with sentences of its kind.

    Raises:
        ValueError: As ``check_wish``; or too few sentences are left that do not name the concept.
    """
    check_wish(wish)
    names = list(dict.fromkeys((bare(wish.name), *wish.also)))
    phrase, target = phrase_of(wish.name, wish.kind), phrase_of(wish.target, wish.kind)
    edit = _sentences(wish.kind, "edit", names, EDIT)
    return {
        "kind": wish.kind,
        "names": names,
        "target": target,
        "anchor": target,
        "question": wish.question or templates()["questions"][wish.kind].format(phrase),
        "adjacent": list(wish.adjacent),
        "direct": [sentence.replace("{}", phrase) for sentence in _sentences(wish.kind, "direct", names, DIRECT)],
        "adversarial": list(wish.prompts),
        "edit_prompts": [sentence.replace("{}", phrase) for sentence in edit],
        "target_prompts": [sentence.replace("{}", target) for sentence in edit],
    }


def _sentences(kind: str, use: str, names: Sequence[str], number: int) -> list[str]:
    found = [sentence for sentence in templates()["kinds"][kind][use] if not find_names(sentence, names)]
    if len(found) < number:
        raise ValueError(
            f"concept={names[0]!r} is a word of most sentences that could be written about it: give a longer name, "
            "or write a concept set by hand."
        )
    return found[:number]


def set_of(
    wishes: Sequence[Wish],
    path: Path,
    name: str = "erase",
    protect: Sequence[str] = (),
    retain: Sequence[str] = (),
    judged: Collection[str] | None = None,
) -> ConceptSet:
    """A concept set for ``wishes``, with the concepts and prompts that an edit of them retains.

    Args:
        wishes: The concepts to edit, at least one.
        path: Where the set will be written; errors name it.
        name: Name of the set.
        protect: Names of neighbours to retain and to judge, of the kind of the first wish.
        retain: The user's own prompts to retain. Those that name a concept to edit are refused.
        judged: Questions that the judge can answer; concepts with others are retained without being judged. None for
            all.

    Raises:
        ValueError: A name, a target, a neighbour or a prompt is wrong; the message says which, and what to do.
    """
    edited = {name_key(bare(wish.name)) for wish in wishes}
    named = [label for wish in wishes for label in (bare(wish.name), *wish.also)]
    for wish in wishes:
        check_wish(wish)
    for neighbour in protect:
        if not name_key(bare(neighbour)):
            raise ValueError(f"protect={neighbour!r} has nothing that can be read: give a word or a phrase.")
        if find_names(neighbour, named):
            raise ValueError(
                f"protect={neighbour!r} names what is to be erased ({', '.join(named)}): protect something else."
            )
    for prompt in retain:
        if find_names(prompt, named):
            raise ValueError(
                f"retain has {prompt!r}, which names what is to be erased ({', '.join(named)}): take it out."
            )
    kept = [Wish(one, _other_target(one, wishes), wishes[0].kind) for one in protect]
    taken = edited | {name_key(bare(wish.name)) for wish in kept}
    general = [Wish(other["name"], other["target"], other["kind"]) for other in templates()["others"]]
    kept += [w for w in general if name_key(bare(w.name)) not in taken and not find_names(w.name, named)]
    fields = {bare(wish.name): written(wish) for wish in kept}
    unjudged = [key for key, own in fields.items() if judged is not None and own["question"] not in judged]
    more = [text for key in unjudged for text in fields.pop(key)["edit_prompts"]]
    adjacent = [bare(one) for one in protect if bare(one) in fields]
    own = {bare(wish.name): {**written(wish), "adjacent": [*wish.adjacent, *adjacent]} for wish in wishes}
    texts = [text for text in (*retain, *templates()["retain"], *more) if not find_names(text, named)]
    content = {
        "name": name,
        "prompts_per_concept": {"direct": DIRECT, "indirect": 0, "edit": EDIT},
        "retain": list(dict.fromkeys(texts)),
        "concepts": {**own, **fields},
    }
    return concept_set_of(content, path)


def _other_target(neighbour: str, wishes: Sequence[Wish]) -> str:
    """What a neighbour would become if it were edited: a set has to say."""
    for target in (wishes[0].target, "something else"):
        if not find_names(target, [bare(neighbour)]) and name_key(bare(target)) != name_key(bare(neighbour)):
            return target
    return "another thing"


def summary(concept: Concept) -> list[str]:
    """A few lines that show a concept: its names, target and question, and the first of its prompts."""
    lines = [
        f"{concept.name} ({concept.kind}) -> {concept.target}",
        f"  names      {', '.join(concept.names)}",
        f"  question   {concept.question}",
    ]
    if concept.adjacent:
        lines.append(f"  neighbours {', '.join(concept.adjacent)}")
    for label, prompts in (
        ("edit", concept.edit_prompts),
        ("target", concept.target_prompts),
        ("direct", concept.direct),
        ("indirect", concept.indirect),
        ("adversarial", concept.adversarial),
    ):
        lines += [f"  {label if not place else '':10} {prompt}" for place, prompt in enumerate(prompts)]
    return lines
