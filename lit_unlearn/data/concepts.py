"""Concepts and concept sets: what is edited, into what, and the prompts for the edit and its evaluation.

A concept set is a YAML file (``concept_sets/emoji20.yaml`` is one to copy from). For each concept it has evaluation
prompts that name the concept (``direct``) or describe it without its name (``indirect``), and pairs of
``edit_prompts`` and ``target_prompts`` for the edit. A set is checked completely when it is loaded:
evaluation prompts never occur among edit prompts, indirect prompts never contain a name of their concept, and no prompt
occurs twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lit_unlearn.data.checks import check_concept_set, concept_error
from lit_unlearn.data.concept import Concept, PromptCounts
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.data.names import longer_names, name_key
from lit_unlearn.system.errors import user_errors
from lit_unlearn.system.files import atomic_write
from lit_unlearn.system.strict_yaml import load_yaml

MAX_BYTES = 2_000_000
"""Size limit of a concept set in bytes."""
MAX_CONCEPTS, MAX_NAMES, MAX_TEXT = 2000, 50, 1000
"""Limits for concepts per set, names per concept and characters per prompt, so that no file takes hours to check."""


@dataclass(frozen=True)
class ConceptSet:
    """Concepts that are judged together: when one is edited, the others must be retained.

    Attributes:
        name: Name of the set.
        concepts: Concepts by name, in the order of the file.
        path: File that the set was read from.
        counts: Prompts per concept.
        retain: Further prompts that every edit retains and that nothing is judged on.
    """

    name: str
    concepts: dict[str, Concept]
    path: Path
    counts: PromptCounts = field(default_factory=PromptCounts)
    retain: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        longer = longer_names({name: concept.names for name, concept in self.concepts.items()})
        found = {name: replace(concept, longer_names=longer[name]) for name, concept in self.concepts.items()}
        object.__setattr__(self, "concepts", found)

    @classmethod
    def load(cls, name_or_path: str | Path) -> ConceptSet:
        """Read and check a concept set.

        Args:
            name_or_path: Name of a set that ships with the package (``emoji20``), or path of a YAML file.

        Raises:
            UserError: There is no such set, or it is not valid; the message names file, concept and field.
        """
        with user_errors():
            return load_concept_set(name_or_path)

    @classmethod
    def of(
        cls,
        concept: str,
        to: str,
        *,
        kind: str = "object",
        also: Sequence[str] = (),
        protect: Sequence[str] = (),
        retain: Sequence[str] = (),
        question: str | None = None,
    ) -> ConceptSet:
        """A set for one concept, with sentences of its kind and general concepts to retain; see ``data.templates``.

        Args:
            concept: The concept, as people write it in prompts.
            to: What to draw in its place.
            kind: One of ``KINDS``.
            also: Further words that name it.
            protect: Neighbours of the same kind, to retain and to judge.
            retain: Prompts to retain.
            question: Question to the judge; None takes the kind's.

        Raises:
            UserError: A name, the target, the kind or a prompt is wrong.
        """
        from lit_unlearn.data.templates import Wish, set_of  # which makes sets

        with user_errors():
            wish = Wish(concept, to, kind, tuple(also), question)
            return set_of([wish], Path("concepts.yaml"), protect=protect, retain=retain)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the set as a YAML file, which ``load`` reads.

        Args:
            path: The file, ``.yaml``.
            overwrite: Replace the file if it exists.

        Raises:
            UserError: The name does not end in ``.yaml``, or the file exists.
            OSError: The file cannot be written.
        """
        with user_errors():
            check_set_output(Path(path), overwrite)
        text = yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=120)
        with atomic_write(path) as file:
            file.write(text.encode())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the concepts as canonical JSON, in order; moving, reformatting or commenting the file keeps it."""
        content: list[Any] = [concept.content() for concept in self.concepts.values()]
        if self.retain:
            content.append(list(self.retain))
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """The set as the content of a YAML file; a set that is read from it equals this one."""
        concepts = {}
        for concept in self.concepts.values():
            own = {k: list(v) if isinstance(v, tuple) else v for k, v in concept.content().items() if k != "name"}
            concepts[concept.name] = {k: v for k, v in own.items() if v != []}
        retain = {"retain": list(self.retain)} if self.retain else {}
        return {"name": self.name, "prompts_per_concept": asdict(self.counts), **retain, "concepts": concepts}

    def check_same(self, file: str, sha256: str, name: object) -> None:
        """Refuse a file that was made with another concept set.

        Args:
            file: Name of the file, which begins the message.
            sha256: SHA-256 of the set that the file was made with.
            name: Name of that set; None if the file does not have it.

        Raises:
            ValueError: The file was made with another set, or the content of the set has changed.
        """
        if sha256 == self.sha256:
            return
        if name == self.name:
            raise ValueError(
                f"{file} was made with other content of the concept set {self.name!r} than {self.path} has now: "
                "restore that, or fit again."
            )
        raise ValueError(
            f"{file} was made with {'another concept set' if name is None else f'the concept set {name!r:.60}'}, not "
            f"with {self.name!r} ({self.path}): give that one as model.init_args.concept_set, or fit again."
        )

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

        As in the paper these are the edit prompts of all other concepts; the set's own ``retain`` follow. Prompts that
        name an edited concept ("a cartoon dog" of the concept cartoon, when dog is edited) are left out, because
        retaining them would prevent the edit.

        Args:
            edited: Names of the edited concepts.

        Raises:
            ValueError: An edited concept is not in the set.
        """
        concepts = [self.get(name) for name in ([edited] if isinstance(edited, str) else edited)]
        found = self._retained(concepts, lambda concept: concept.edit_prompts, "edit prompts")
        return found + [text for text in self.retain if not any(own.find_name(text) for own in concepts)]

    def retain_names(self, edited: Sequence[str]) -> list[str]:
        """Return the names of all other concepts, in the order of the file, except names that name an edited concept.

        Args:
            edited: Names of the edited concepts.

        Raises:
            ValueError: An edited concept is not in the set.
        """
        return self._retained([self.get(name) for name in edited], lambda concept: concept.names, "names")

    def _retained(self, edited: Sequence[Concept], texts: Callable[[Concept], Sequence[str]], what: str) -> list[str]:
        """Texts of the other concepts that do not name one of ``edited``; warns if a concept has no text left."""
        others = [concept for concept in self.concepts.values() if concept not in edited]
        kept = {c.name: [t for t in texts(c) if not any(own.find_name(t) for own in edited)] for c in others}
        if lost := [name for name, own in kept.items() if not own]:
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(
                f"Nothing retains {', '.join(lost)}: all {what} of {'each' if len(lost) > 1 else 'it'} name an edited "
                f"concept ({', '.join(concept.name for concept in edited)}), so reword some in the concept set "
                f"{self.name!r}, or expect the edit to take it along."
            )
        return [text for own in kept.values() for text in own]

    def adjacent(self, edited: Sequence[str]) -> list[str]:
        """Return the concepts that are adjacent to one of ``edited`` and not edited themselves, in the set's order.

        Raises:
            ValueError: An edited concept is not in the set.
        """
        concepts = [self.get(name) for name in edited]
        near = {name_key(name) for concept in concepts for name in concept.adjacent}
        near -= {name_key(concept.name) for concept in concepts}
        return [name for name in self.concepts if name_key(name) in near]


def check_set_output(output: Path, overwrite: bool) -> None:
    """Refuse a file that a concept set cannot be written to.

    Raises:
        ValueError: The name does not end in ``.yaml``, or the file exists and may not be replaced.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"output={output} must end in .yaml.")
    if output.exists() and not overwrite:
        raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")


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
        if path.suffix.lower() in (".csv", ".tsv"):
            raise ValueError(
                f"The concept set {path} is a table, but a set is a YAML file: {_example()} is one to copy from."
            )
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
    """Parse and check a file's content; cached, because a command reads the same set several times."""
    return concept_set_of(load_yaml(content, path), path)


def concept_set_of(content: object, path: Path) -> ConceptSet:
    """The set with this ``content``, of the file ``path`` or of ``ConceptSet.content``; see ``load_concept_set``."""
    concept_set = _parse(content, path)
    check_concept_set(concept_set)
    return concept_set


def _example() -> str:
    """Path of a concept set to copy from."""
    return str(files(__package__) / "concept_sets" / "emoji20.yaml")


def available_concept_sets() -> list[str]:
    """Return the names of the concept sets that ship with the package."""
    entries = (files(__package__) / "concept_sets").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _parse(data: object, path: Path) -> ConceptSet:
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a concept set: it has no mapping with the key 'concepts'.")
    known = ("name", "prompts_per_concept", "retain", "concepts")
    _check_keys(data, known=known, required=("concepts",), where=f"{path}")
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
        retain=_parse_retain(data.get("retain", []), path),
    )


def _parse_retain(entry: object, path: Path) -> tuple[str, ...]:
    if not isinstance(entry, list):
        raise ValueError(f"{path}: field 'retain' must be a list of prompts, not {entry!r:.60}.")
    for number, item in enumerate(entry, start=1):
        if not isinstance(item, str) or not item.strip() or len(item) > MAX_TEXT:
            rule = f"must be text of 1 to {MAX_TEXT} characters"
            raise ValueError(f"{path}: field 'retain': item {number} {rule}, not {item!r:.60}.")
    return tuple(entry)


def _parse_counts(entry: object, path: Path) -> PromptCounts:
    where = f"{path}: field 'prompts_per_concept'"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping such as {{direct: 5, indirect: 5, edit: 15}}.")
    _check_keys(entry, known=[item.name for item in fields(PromptCounts)], required=(), where=where)
    for key, count in entry.items():
        least = 0 if key == "indirect" else 1
        if type(count) is not int or count < least:
            raise ValueError(f"{where}: {key!r} must be a whole number of at least {least}, not {count!r}.")
    return PromptCounts(**entry)


def _parse_concept(name: object, entry: object, path: Path) -> Concept:
    if not isinstance(name, str) or not name_key(name):
        raise ValueError(
            f"{path}: field 'concepts': a concept's name must be text, not {name!r:.60}; put it in quotes."
        )
    where = f"{path}: concept {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping of fields, not {entry!r:.60}.")
    optional = ("names", "adjacent", "adversarial", "indirect")
    known = [item.name for item in fields(Concept) if item.compare and item.name != "name"]
    _check_keys(entry, known=known, required=[key for key in known if key not in optional], where=where)
    values: dict[str, Any] = {}
    for key in known:
        value = entry.get(key, [name] if key == "names" else [])
        if key in ("kind", "target", "anchor", "question"):
            values[key] = _text(value, path, name, key, "must be text")
            if key == "kind" and value not in KINDS:
                raise concept_error(path, name, key, f"{value!r} is not one of {', '.join(KINDS)}")
            continue
        if not isinstance(value, list):
            raise concept_error(path, name, key, f"must be a list, not {value!r:.60}")
        items = enumerate(value, start=1)
        if key == "names" and len(value) > MAX_NAMES:
            raise concept_error(path, name, key, f"lists {len(value)} names, more than {MAX_NAMES}")
        values[key] = tuple(_text(item, path, name, key, f"item {number} must be text") for number, item in items)
    return Concept(name=name, **values)


def _text(value: object, path: Path, concept: str, field_name: str, rule: str) -> str:
    if not isinstance(value, str):
        raise concept_error(path, concept, field_name, f"{rule}, not {value!r:.60}; put it in quotes")
    if not value.strip():
        nothing = (
            "; name what to edit into here, and to edit into nothing set model.init_args.towards to empty (UCE, SPEED)"
        )
        remedy = nothing if field_name == "target" else ""
        raise concept_error(path, concept, field_name, f"{rule}, but is empty{remedy}")
    if len(value) > MAX_TEXT:
        raise concept_error(path, concept, field_name, f"{rule} of at most {MAX_TEXT} characters, not {len(value)}")
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
