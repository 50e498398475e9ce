"""Concepts and concept sets: what is edited, into what, and with which prompts it is edited and judged.

A concept set is a YAML file (``concept_sets/emoji20.yaml`` is one to copy from). Per concept it holds evaluation
prompts that name the concept (``direct``) and that describe it without its name (``indirect``), and pairs of
``edit_prompts`` and ``target_prompts`` that an edit is made from. A set is checked in full when it is loaded:
evaluation prompts never occur among edit prompts, indirect prompts never contain a name of their concept, and no prompt
occurs twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_unlearn.system.strict_yaml import load_yaml

KINDS = ("object", "action", "style", "scene")

MAX_BYTES = 2_000_000
"""Largest concept set that is read."""
MAX_CONCEPTS, MAX_NAMES, MAX_TEXT = 2000, 50, 1000
"""Most concepts of a set, names of a concept and characters of a prompt: no file shall take hours to check."""


@dataclass(frozen=True)
class PromptCounts:
    """Prompts per concept; the defaults are the paper's. A set may declare others as ``prompts_per_concept``."""

    direct: int = 5
    indirect: int = 5
    edit: int = 15


@dataclass(frozen=True)
class Concept:
    """One concept: its names, its evaluation prompts and the prompt pairs that edit it.

    Attributes:
        name: Name of the concept, unique in its set.
        kind: ``object``, ``action``, ``style`` or ``scene``.
        names: Words or phrases that name the concept, matched as whole words whatever their case.
        target: What the concept becomes: the name of another concept, or free text.
        anchor: Prompt of the broader or neighbouring concept that concept ablation maps it to.
        question: Question to a judge; "yes" says that the picture shows the concept.
        direct: Evaluation prompts that name the concept.
        indirect: Evaluation prompts that describe the concept without naming it.
        edit_prompts: E, prompts that show the concept.
        target_prompts: E*, ``edit_prompts`` with the concept replaced by its target, in the same order.
        adjacent: Names of the set's concepts that are nearest in meaning, the first to suffer from a careless edit.
        adversarial: Evaluation prompts that look like gibberish.
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

    @property
    def prompts(self) -> tuple[str, ...]:
        """Evaluation prompts of the paper's protocol: the direct ones, then the indirect ones."""
        return self.direct + self.indirect

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        phrases = (r"[\s_-]+".join(re.escape(word) for word in name.split()) for name in self.names)
        return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)

    def find_name(self, text: str) -> str | None:
        """Return the first whole word or phrase of ``text`` that names the concept, as it is written there, or None."""
        match = self._pattern.search(text)
        return match.group() if match else None

    def replace_names(self, text: str, replacement: str) -> str:
        """Return ``text`` with ``replacement`` in place of every word or phrase that names the concept."""
        return self._pattern.sub(lambda match: replacement, text)


@dataclass(frozen=True)
class ConceptSet:
    """Concepts that are judged together: when one is edited, the others are what must be retained.

    Attributes:
        name: Name of the set.
        concepts: Concepts by name, in the order of the file.
        path: File that the set was read from.
        counts: Prompts per concept.
    """

    name: str
    concepts: dict[str, Concept]
    path: Path
    counts: PromptCounts = field(default_factory=PromptCounts)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the concepts as canonical JSON, in order: the same for a moved, reformatted or commented file."""
        content = [asdict(concept) for concept in self.concepts.values()]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """The set as a YAML file of it would hold it: read again, it is equal to this one."""
        concepts = {}
        for concept in self.concepts.values():
            own = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(concept).items() if k != "name"}
            concepts[concept.name] = {k: v for k, v in own.items() if v != []}
        return {"name": self.name, "prompts_per_concept": asdict(self.counts), "concepts": concepts}

    def get(self, name: str) -> Concept:
        """Return the concept called ``name``; case, spaces, ``_`` and ``-`` do not matter (``Soccer_Ball``).

        Raises:
            ValueError: The set has no such concept.
        """
        by_key = {name_key(known): known for known in self.concepts}
        known = by_key.get(name_key(name))
        if known is not None:
            return self.concepts[known]
        close = [by_key[key] for key in get_close_matches(name_key(name), by_key, cutoff=0.5)]
        remedy = f"closest names: {', '.join(close)}" if close else f"its concepts are: {', '.join(self.concepts)}"
        raise ValueError(f"The concept set {self.name!r} has no concept {name!r}; {remedy}.")

    def retain_prompts(self, edited: Sequence[str]) -> list[str]:
        """Return the retention set for an edit of the concepts ``edited``, in the order of the file.

        As in the paper these are the edit prompts of all other concepts. Those that name an edited concept ("a cartoon
        dog" of the concept cartoon, when dog is edited) are left out: to retain them would forbid the edit.

        Args:
            edited: Names of the edited concepts.

        Raises:
            ValueError: The set lacks an edited concept.
        """
        concepts = [self.get(name) for name in ([edited] if isinstance(edited, str) else edited)]
        edited_names = {concept.name for concept in concepts}
        return [
            prompt
            for concept in self.concepts.values()
            if concept.name not in edited_names
            for prompt in concept.edit_prompts
            if not any(other.find_name(prompt) for other in concepts)
        ]

    def adjacent(self, edited: Sequence[str]) -> list[str]:
        """Return the concepts that are adjacent to one of ``edited`` and not edited themselves, in the set's order.

        Raises:
            ValueError: The set lacks an edited concept.
        """
        concepts = [self.get(name) for name in edited]
        near = {name_key(name) for concept in concepts for name in concept.adjacent}
        near -= {name_key(concept.name) for concept in concepts}
        return [name for name in self.concepts if name_key(name) in near]

    def validate(self) -> None:
        """Check everything that an edit and its evaluation rely on.

        Raises:
            ValueError: What is wrong first, with file, concept and field.
        """
        keys: dict[str, str] = {}
        for name in self.concepts:
            if (other := keys.setdefault(name_key(name), name)) != name:
                raise ValueError(f"{self.path}: the concepts {other!r} and {name!r} have the same name; rename one.")
        for concept in self.concepts.values():
            self._validate_concept(concept)
        self._validate_unique()

    def _validate_concept(self, concept: Concept) -> None:
        def fail(field_name: str, problem: str) -> ValueError:
            return _error(self.path, concept.name, field_name, problem)

        if concept.kind not in KINDS:
            raise fail("kind", f"{concept.kind!r} is not one of {', '.join(KINDS)}")
        if not concept.names:
            raise fail("names", "is empty; list at least one word or phrase that names the concept")
        if name_key(concept.target) in {name_key(name) for name in (concept.name, *concept.names)}:
            raise fail("target", f"{concept.target!r} is the concept itself; choose another concept to edit it into")
        if name := concept.find_name(concept.anchor):
            raise fail("anchor", f"{concept.anchor!r} names the concept ({name!r}); choose an anchor that does not")
        if len(concept.edit_prompts) != len(concept.target_prompts):
            raise fail(
                "target_prompts",
                f"{len(concept.edit_prompts)} edit prompts but {len(concept.target_prompts)} target prompts; "
                "each edit prompt needs its target prompt at the same place",
            )
        counts = self.counts
        for field_name, expected in (
            ("direct", counts.direct),
            ("indirect", counts.indirect),
            ("edit_prompts", counts.edit),
        ):
            if (found := len(getattr(concept, field_name))) != expected:
                raise fail(field_name, f"{found} prompts where {expected} are due (prompts_per_concept)")
        for prompt in concept.direct:
            if not concept.find_name(prompt):
                raise fail("direct", f"{prompt!r} contains none of the concept's names ({', '.join(concept.names)})")
        for field_name in ("indirect", "target_prompts"):
            for prompt in getattr(concept, field_name):
                if name := concept.find_name(prompt):
                    raise fail(field_name, f"{prompt!r} names the concept ({name!r}); reword it")
        for prompt, target_prompt in zip(concept.edit_prompts, concept.target_prompts, strict=True):
            if _prompt_key(prompt) == _prompt_key(target_prompt):
                raise fail("target_prompts", f"{target_prompt!r} equals its edit prompt, so that it would edit nothing")
        for name in concept.adjacent:
            if name not in self.concepts:
                close = get_close_matches(name, self.concepts)
                remedy = f"closest names: {', '.join(close)}" if close else "name concepts of this set"
                raise fail("adjacent", f"{name!r} is not in the set; {remedy}")
            if name == concept.name:
                raise fail("adjacent", f"{name!r} is the concept itself; name other concepts of the set")

    def _validate_unique(self) -> None:
        """Every direct, indirect, adversarial and edit prompt occurs once in the whole set.

        Target prompts may repeat: several concepts may share a target, whose own prompts they then use.
        """
        places: dict[str, tuple[str, str]] = {}
        for concept in self.concepts.values():
            for field_name in ("direct", "indirect", "adversarial", "edit_prompts"):
                for prompt in getattr(concept, field_name):
                    if (key := _prompt_key(prompt)) not in places:
                        places[key] = (concept.name, field_name)
                        continue
                    other_concept, other_field = places[key]
                    where = f"in {other_field!r} of {other_concept!r}"
                    if field_name == "edit_prompts" and other_field != "edit_prompts":
                        reason = f"is an evaluation prompt, {where}; an edit must not see what it is judged on"
                    elif other_field == "edit_prompts" and field_name != "edit_prompts":
                        reason = f"is an edit prompt, {where}; an edit must not see what it is judged on"
                    else:
                        reason = f"is a duplicate: it occurs {where} already"
                    raise _error(self.path, concept.name, field_name, f"{prompt!r} {reason}")


def load_concept_set(name_or_path: str | Path) -> ConceptSet:
    """Read and check a concept set.

    Args:
        name_or_path: Name of a set that ships with the package (``emoji20``), or path of a YAML file.

    Raises:
        ValueError: There is no such set, or it is not valid; the message names file, concept and field.
    """
    path = Path(name_or_path).expanduser()
    if path.name == str(name_or_path) and not path.suffix:
        known = available_concept_sets()
        if path.name not in known:
            raise ValueError(
                f"There is no concept set {path.name!r}; the package has: {', '.join(known)}. "
                f"A file of your own is given with its ending, such as '{path.name}.yaml'."
            )
        source = files(__package__) / "concept_sets" / f"{path.name}.yaml"
        path = Path(str(source))
        content = source.read_bytes()
    else:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"The concept set {path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"The concept set {path} is larger than {MAX_BYTES:,} bytes; is it the right file?")
    return _read(content, path)


@lru_cache(maxsize=8)
def _read(content: bytes, path: Path) -> ConceptSet:
    """Parse and check a file's content; a command asks for the same one several times."""
    return concept_set_of(load_yaml(content, path), path)


def concept_set_of(content: object, path: Path) -> ConceptSet:
    """The set that a file holds at ``path``, or that ``ConceptSet.content`` has written; as ``load_concept_set``."""
    concept_set = _parse(content, path)
    concept_set.validate()
    return concept_set


def available_concept_sets() -> list[str]:
    """Return the names of the concept sets that ship with the package."""
    entries = (files(__package__) / "concept_sets").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def name_key(name: str) -> str:
    """Return ``name`` as it is compared: without case, spaces, ``_`` and ``-``."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def _prompt_key(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _error(path: Path, concept: str, field_name: str, problem: str) -> ValueError:
    return ValueError(f"{path}: concept {concept!r}, field {field_name!r}: {problem}.")


def _parse(data: object, path: Path) -> ConceptSet:
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a concept set: it has no mapping with the key 'concepts'.")
    _check_keys(data, known=("name", "prompts_per_concept", "concepts"), required=("concepts",), where=f"{path}")
    concepts = data["concepts"]
    if not isinstance(concepts, dict) or not concepts:
        raise ValueError(f"{path}: field 'concepts' must map at least one name to a concept.")
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"{path}: {len(concepts)} concepts are more than {MAX_CONCEPTS}; is it the right file?")
    name = data.get("name", path.stem)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path}: field 'name' must be text, not {name!r}.")
    return ConceptSet(
        name=name,
        concepts={key: _parse_concept(key, entry, path) for key, entry in concepts.items()},
        path=path,
        counts=_parse_counts(data.get("prompts_per_concept", {}), path),
    )


def _parse_counts(entry: object, path: Path) -> PromptCounts:
    where = f"{path}: field 'prompts_per_concept'"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping such as {{direct: 5, indirect: 5, edit: 15}}.")
    _check_keys(entry, known=[item.name for item in fields(PromptCounts)], required=(), where=where)
    for key, count in entry.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{where}: {key!r} must be a whole number of at least 1, not {count!r}.")
    return PromptCounts(**entry)


def _parse_concept(name: object, entry: object, path: Path) -> Concept:
    if not isinstance(name, str) or not name_key(name):
        raise ValueError(
            f"{path}: field 'concepts': a concept's name must be text, not {name!r:.60}; put it in quotes."
        )
    where = f"{path}: concept {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping of fields, not {entry!r:.60}.")
    optional = ("names", "adjacent", "adversarial")
    known = [item.name for item in fields(Concept) if item.name != "name"]
    _check_keys(entry, known=known, required=[key for key in known if key not in optional], where=where)
    values: dict[str, Any] = {}
    for key in known:
        value = entry.get(key, [name] if key == "names" else [])
        if key in ("kind", "target", "anchor", "question"):
            values[key] = _text(value, path, name, key, "must be text")
            continue
        if not isinstance(value, list):
            raise _error(path, name, key, f"must be a list, not {value!r:.60}")
        items = enumerate(value, start=1)
        if key == "names" and len(value) > MAX_NAMES:
            raise _error(path, name, key, f"lists {len(value)} names, more than {MAX_NAMES}")
        values[key] = tuple(_text(item, path, name, key, f"item {number} must be text") for number, item in items)
    return Concept(name=name, **values)


def _text(value: object, path: Path, concept: str, field_name: str, rule: str) -> str:
    if not isinstance(value, str):
        raise _error(path, concept, field_name, f"{rule}, not {value!r:.60}; put it in quotes")
    if not value.strip():
        raise _error(path, concept, field_name, f"{rule}, but is empty")
    if len(value) > MAX_TEXT:
        raise _error(path, concept, field_name, f"{rule} of at most {MAX_TEXT} characters, not {len(value)}")
    return value


def _check_keys(entry: Mapping[Any, object], known: Iterable[str], required: Iterable[str], where: str) -> None:
    known = list(known)
    for key in entry:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."
            raise ValueError(f"{where}: unknown key {key!r}; {remedy}")
    for key in required:
        if key not in entry:
            raise ValueError(f"{where}: the key {key!r} is missing.")
