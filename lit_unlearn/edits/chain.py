"""Edits on top of edits (``fit --base_edit``): what each of them was, and how one is taken out again.

A checkpoint or delta of several edits holds the weights that the last one has left. Its ``chain`` says, edit by edit,
what made them, which weights it wrote and their hash right after it. Where an edit has replaced values that an earlier
one had written, these are kept too (``overwritten``), so that the last edit can be taken out exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.parameters import fingerprint

if TYPE_CHECKING:
    from lit_unlearn.edits.checkpoint import Edit

OVERWRITTEN = "overwritten."
"""How the names of replaced values begin in a delta: ``overwritten.1.unet.mid_block. ... .weight``."""
LARGEST = 1000
"""Most edits in a chain that is read."""


@dataclass(frozen=True)
class Link:
    """One edit of a chain.

    Attributes:
        method: Name of the method's class.
        concepts: Names of the concepts that it edited.
        names: Full names of the weights that it wrote.
        again: Names of earlier concepts that it has edited again.
        sha256: Hash of these weights' values right after it, as ``fingerprint``.
        config: Arguments of the method.
        version: Version of lit-unlearn that made it, if known.
        edit: The solver and its settings, if a closed form computed the weights.
        recipe: The part of the recipe that determines the fit's result, if known.
        concept_set: The content of the concept set, as in its file, if known.
        concept_set_sha256: Its hash, if known.

    Raises:
        ValueError: A field has the wrong type; no file is trusted.
    """

    method: str
    concepts: list[str]
    names: list[str]
    sha256: str
    config: dict[str, Any]
    version: str | None = None
    edit: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    concept_set: dict[str, Any] | None = None
    concept_set_sha256: str | None = None
    again: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wrong = [] if self.names else ["names"]
        wrong += [name for name in ("method", "sha256") if not isinstance(getattr(self, name), str)]
        for name in ("concepts", "names", "again"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                wrong.append(name)
        wrong += [n for n in ("edit", "recipe", "concept_set") if not isinstance(getattr(self, n), dict | None)]
        if not isinstance(self.config, dict) or not all(isinstance(name, str) for name in self.config):
            wrong.append("config")
        wrong += [n for n in ("version", "concept_set_sha256") if not isinstance(getattr(self, n), str | None)]
        if wrong:
            raise ValueError(f"the {wrong[0]} of an edit in its chain is of the wrong type")

    def stored(self) -> dict[str, Any]:
        """Its fields, for a checkpoint or JSON."""
        return asdict(self)

    @classmethod
    def read(cls, stored: object) -> Link:
        """The link that ``stored`` has written.

        Raises:
            ValueError: It is something else.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(stored, Mapping):
            raise ValueError("an edit in its chain is no mapping")
        if further := sorted(map(str, set(stored) - known)):
            raise ValueError(f"an edit in its chain has the field {further[0]!r:.40}, which this version does not know")
        try:
            return cls(**stored)
        except TypeError as error:
            raise ValueError("an edit in its chain lacks a field") from error

    def title(self) -> str:
        """``dog (UCE)``."""
        return title_of(self.concepts, self.method)


def title_of(concepts: Sequence[str], method: str) -> str:
    """``dog (UCE)``, or ``pictures (SISS)``."""
    return f"{', '.join(concepts) or 'pictures'} ({method})"


def chain_of_checkpoint(
    path: Path,
    ours: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    arguments: dict[str, Any],
    solver: dict[str, Any] | None,
) -> dict[str, Any]:
    """The fields ``chain`` and ``overwritten`` of the edit in a checkpoint; empty if it is of the base model.

    Args:
        path: The checkpoint.
        ours: What it stores under ``CHECKPOINT_KEY``.
        weights: Its weights.
        arguments: Arguments of the method.
        solver: The solver and its settings.

    Raises:
        ValueError: They are not as a fit writes them.
    """
    if (stored := ours.get("chain")) is None:
        return {}
    own = {name: ours.get(name) for name in ("method", "version", "recipe", "concept_set", "concept_set_sha256")}
    own |= {name: stored[name] for name in ("concepts", "names", "again")} | {"config": arguments, "edit": solver}
    own["sha256"] = fingerprint({name: weights[name] for name in stored["names"]})
    return _checked(path, [*stored["links"], own], stored["overwritten"], weights, ours["concepts"])


def split_weights(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The new values in a delta, and the values that they replaced, these by ``NUMBER/NAME``."""
    weights = {name: value for name, value in found.items() if not name.startswith(OVERWRITTEN)}
    return weights, {key_of(name): value for name, value in found.items() if name not in weights}


def key_of(name: str) -> str:
    """``NUMBER/NAME`` of a replaced value, from its name in a delta."""
    return name.removeprefix(OVERWRITTEN).replace(".", "/", 1)


def name_of(key: str) -> str:
    """Name in a delta of the replaced value ``NUMBER/NAME``."""
    return OVERWRITTEN + key.replace("/", ".", 1)


def chain_of_delta(
    path: Path, links: object, overwritten: Mapping[str, Tensor], weights: Mapping[str, Tensor], concepts: object
) -> dict[str, Any]:
    """As ``chain_of_checkpoint``, for a delta, whose ``links`` are those of all its edits, or None.

    Raises:
        ValueError: They do not fit the weights.
    """
    if links is None and not overwritten:
        return {}
    return _checked(path, links, overwritten, weights, concepts)


def _checked(
    path: Path, links: object, overwritten: Mapping[str, Tensor], weights: Mapping[str, Tensor], concepts: object
) -> dict[str, Any]:
    try:
        chain = _links(links, overwritten, weights)
        if [*dict.fromkeys(name for link in chain for name in link.concepts)] != concepts:
            raise ValueError("its concepts are not those of the edits in its chain")
        return {"chain": chain, "overwritten": dict(overwritten)}
    except ValueError as error:
        raise ValueError(
            f"ckpt_path={path} is no valid edit ({error}): the file is damaged; get it from its author again."
        ) from error


def _links(links: object, overwritten: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Link]:
    if not isinstance(links, list) or not 1 < len(links) <= LARGEST:
        raise ValueError("its chain is not a list of edits")
    chain = [Link.read(link) for link in links]
    if {name for link in chain for name in link.names} != set(weights):
        raise ValueError("its weights are not those of the edits in its chain")
    wanted = {
        f"{number}/{name}"
        for number, link in enumerate(chain)
        for name in link.names
        if any(name in earlier.names for earlier in chain[:number])
    }
    if other := sorted(wanted ^ set(overwritten)):
        raise ValueError(f"{other[0]!r:.100} is missing, or not a value that an edit in its chain has replaced")
    for key, value in overwritten.items():
        like = weights[key.partition("/")[2]]
        if value.shape != like.shape or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"the replaced value {key!r:.100} does not fit its weight")
    for number, (link, values) in enumerate(zip(chain, left_by(chain, weights, overwritten), strict=True), 1):
        if fingerprint(values) != link.sha256:
            raise ValueError(f"its edit {number} does not have the hash that its chain says")
    return chain


def left_by(
    chain: Sequence[Link], weights: Mapping[str, Tensor], overwritten: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """For each edit of a chain, the values of its weights right after it."""
    for number, link in enumerate(chain):
        found = {}
        for name in link.names:
            later = (n for n in range(number + 1, len(chain)) if f"{n}/{name}" in overwritten)
            found[name] = overwritten[f"{n}/{name}"] if (n := next(later, None)) is not None else weights[name]
        yield found


def link_of(edit: Edit) -> Link:
    """A single edit as a link."""
    return Link(
        method=edit.method,
        concepts=edit.concepts,
        names=list(edit.weights),
        sha256=fingerprint(edit.weights),
        config=edit.hyper_parameters,
        version=edit.version,
        edit=edit.edit,
        recipe=edit.recipe,
        concept_set=edit.concept_set,
        concept_set_sha256=edit.concept_set_sha256,
    )


def links_of(edit: Edit) -> list[Link]:
    """All edits in a file, the first one first."""
    return list(edit.chain) or [link_of(edit)]


def written_last(edit: Edit) -> list[str]:
    """Names of the weights that the last edit in a file has written."""
    return edit.chain[-1].names if edit.chain else list(edit.weights)


def joined(edits: Sequence[Edit]) -> tuple[dict[str, Tensor], list[Link], dict[str, Tensor]]:
    """The weights, the links and the replaced values of edits of one base model, side by side.

    Raises:
        ValueError: Two of them write the same weight, so neither knows what the other has made of it.
    """
    weights: dict[str, Tensor] = {}
    links: list[Link] = []
    overwritten: dict[str, Tensor] = {}
    for number, edit in enumerate(edits):
        if both := [name for name in edit.weights if name in weights]:
            other = next(other for other in edits[:number] if both[0] in other.weights)
            if other.path == edit.path:
                raise ValueError(f"base_edit={edit.path} is given twice: once is enough.")
            raise ValueError(
                f"base_edit={other.path} ({', '.join(other.concepts)}) and {edit.path} ({', '.join(edit.concepts)}) do "
                f"not go together, since both write {both[0]}"
                f"{f' and {len(both) - 1} more weights' if len(both) > 1 else ''}: give one of them, and edit the "
                "concepts of the other on top of it."
            )
        own = {name: value.to(edit.dtype) for name, value in edit.weights.items()}  # a delta may be rounded
        old = {key: value.to(edit.dtype) for key, value in edit.overwritten.items()}
        chain = links_of(edit)
        hashes = map(fingerprint, left_by(chain, own, old))
        for key, value in old.items():
            place, _, name = key.partition("/")
            overwritten[f"{len(links) + int(place)}/{name}"] = value
        weights |= own
        links += [replace(link, sha256=sha256) for link, sha256 in zip(chain, hashes, strict=True)]
    return weights, links, overwritten


def without(edit: Edit, number: int, base: BaseModel) -> Edit:
    """The edit without one of its edits, whose weights get the values that they had before it.

    Of the others the weights stay as they are, though those after it were fitted on the model with it.

    Args:
        edit: An edit with a chain.
        number: Which one to take out, counted from 0.
        base: Its base model.

    Returns:
        An edit of the remaining links, on the same base model.

    Raises:
        ValueError: It is the only one, or a later one has changed the same weights.
    """
    links = links_of(edit)
    own, later = links[number], links[number + 1 :]
    if len(links) == 1:
        raise ValueError(f"{edit.path} holds one edit, {own.title()}: to be without it, use the base model itself.")
    for place, other in enumerate(later, number + 2):
        if both := [name for name in own.names if name in set(other.names)]:
            raise ValueError(
                f"edit {number + 1}, {own.title()}, cannot be taken out of {edit.path}: edit {place}, {other.title()}, "
                f"started from its {both[0]}{f' and {len(both) - 1} more weights' if len(both) > 1 else ''} and has "
                f"changed them further; take out edit {place} first, or fit {other.title()} again without the other."
            )
        if again := [name for name in own.concepts if name in other.again]:
            raise ValueError(
                f"edit {number + 1}, {own.title()}, cannot be taken out of {edit.path}: edit {place}, {other.title()}, "
                f"has edited {', '.join(again)} again; take out edit {place} first."
            )
    weights = dict(edit.weights)
    for name in own.names:
        before = edit.overwritten.get(f"{number}/{name}")
        if before is None:
            del weights[name]
        else:
            weights[name] = before
    overwritten = {}
    for key, value in edit.overwritten.items():
        old, _, name = key.partition("/")
        if int(old) != number:
            overwritten[f"{int(old) - (int(old) > number)}/{name}"] = value
    left = links[:number] + later
    concepts = list(dict.fromkeys(name for link in left for name in link.concepts))
    last, base_fingerprint = left[-1], base.fingerprint(weights, edit.dtype)
    assert base_fingerprint is not None  # a weight that was edited is there
    config = {name: value for name, value in last.config.items() if name not in ("earlier", "retain_earlier")}
    if "concept" in config:
        config["concept"] = concepts
    return replace(
        edit,
        method=last.method,
        concepts=concepts,
        base_fingerprint=base_fingerprint,
        weights=weights,
        hyper_parameters=config,
        concept_set_sha256=last.concept_set_sha256,
        version=last.version,
        edit=last.edit,
        recipe=last.recipe,
        concept_set=last.concept_set,
        chain=left if len(left) > 1 else [],
        overwritten=overwritten,
    )
