"""The scores of a run: ``scores.json``, what it holds and how it is written and read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_unlearn.system.files import atomic_write

SCHEMA = 1
"""Version of ``scores.json``; raised when a field changes its meaning or goes."""

AnyMeasurement = TypeVar("AnyMeasurement", bound="Measurement")


@dataclass(frozen=True)
class ConceptScore:
    """What the judge saw in the pictures of one concept's prompts."""

    share_with_concept: float | None
    """Share of the judged pictures that show the concept; None if none was judged."""
    n: int
    """Judged pictures."""
    missing: int
    """Pictures without a verdict: never judged, or the judge could not tell."""
    edited: bool
    failed: int = 0
    """Those of the missing that the judge could not tell."""


@dataclass(frozen=True)
class Part:
    """Forget and retain score over some of the prompts; None where no picture was judged."""

    forget: float | None
    retain: float | None


@dataclass(frozen=True)
class Source:
    """Where something came from, with the SHA-256 of its content (None if it cannot be had, e.g. of a hub id)."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Cost:
    """What an edit cost."""

    seconds: float
    unet_forwards: int
    """Pictures or latents that went through the UNet; one of classifier-free guidance counts twice."""
    peak_memory_bytes: int | None = None
    unet_backwards: int = 0
    """Those of the forwards through which gradients flowed back, at about two forwards each."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the judge found on one model: the fields that the edited and the unedited model have in common."""

    forget: float | None
    """Share of the edited concepts' judged pictures without their concept; None if none was judged."""
    retain: float | None
    """Share of the other concepts' judged pictures with theirs; None if none was judged."""
    harmonic_mean: float | None
    intervals: dict[str, tuple[float, float]]
    """Name of a score (at least ``forget`` and ``retain``) -> lower and upper bound, at 95 % confidence."""
    direct: Part
    """Over the prompts that name their concept."""
    indirect: Part
    """Over the prompts that describe their concept without naming it."""
    per_concept: dict[str, ConceptScore]
    adjacent: float | None = None
    """As retain, over the concepts nearest to the edited ones."""
    adversarial: float | None = None
    """As forget, over the adversarial prompts, which are in no other score."""
    err: float | None = None
    """Harmonic mean of forget on direct prompts, retain, adjacent, forget on indirect and on adversarial prompts."""

    @classmethod
    def from_metric(cls: type[AnyMeasurement], result: Mapping[str, Any], **provenance: Any) -> AnyMeasurement:
        """Make it of what ``ForgetRetain.compute`` returns.

        Args:
            result: The computed scores; nan becomes None.
            **provenance: The further fields of ``Scores``, when called on that class.

        Returns:
            The scores.
        """

        def number(name: str) -> float | None:
            value = result.get(name, math.nan)
            return None if math.isnan(value) else float(value)

        per_concept = {}
        for name, concept in result["per_concept"].items():
            share = concept["share_with_concept"]
            per_concept[name] = ConceptScore(**{**concept, "share_with_concept": None if math.isnan(share) else share})
        return cls(
            forget=number("forget"),
            retain=number("retain"),
            harmonic_mean=number("harmonic_mean"),
            intervals=dict(result["intervals"]),
            direct=Part(number("forget_direct"), number("retain_direct")),
            indirect=Part(number("forget_indirect"), number("retain_indirect")),
            per_concept=per_concept,
            adjacent=number("adjacent"),
            adversarial=number("forget_adversarial"),
            err=number("err"),
            **provenance,
        )


@dataclass(frozen=True, kw_only=True)
class Scores(Measurement):
    """All that ``scores.json`` says about a run: the scores, and what one needs to judge and repeat them."""

    method: str
    backbone: Source
    """Hub id or folder of the model that was edited, and the hash of its weights."""
    concepts: Source
    """Name or path of the concept set, and the hash of its text."""
    edited: list[str]
    """Names of the edited concepts; empty for an unedited model."""
    judge: str
    images_per_concept: int
    seed: int
    """Of the pictures: another one draws the same prompts anew."""
    training_seed: int | None = None
    """``seed_everything`` of the fit; None if the method draws nothing at random."""
    before: Measurement | None = None
    """The unedited model on the same prompts and seeds: the floor of forget, the ceiling of retain."""
    cost: Cost | None = None
    edit: dict[str, Any] = field(default_factory=dict)
    """What the method reports of its edit, e.g. the null space of each layer."""
    drift: dict[str, Any] | None = None
    """How far pictures of unrelated prompts moved, same seeds."""
    agreement: dict[str, Any] | None = None
    """Name of the second judge, and Cohen's kappa of both judges' verdicts on the same pictures."""
    calibration: dict[str, Any] | None = None
    """How well the judge tells the unedited model's pictures of each edited concept from those of others of its kind:
    the numbers of ``lit_unlearn.evaluation.judge_curve.Curve`` by concept."""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, as in ``scores.json``."""
        plain = _plain(self)
        order = ("schema", "method", "backbone", "concepts", "edited", "judge", "images_per_concept", "seed")
        return {name: plain[name] for name in (*order, *(name for name in plain if name not in order))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``scores.json``; a file that was there survives a failure."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a ``scores.json``.

        Args:
            path: The file.

        Returns:
            The scores.

        Raises:
            ValueError: The file is missing, is not JSON, has another schema, or lacks or misspells a field.
        """
        path = Path(path)
        content = read_json(path, "a run writes its scores when it is tested")
        if not isinstance(content, dict) or "schema" not in content:
            raise ValueError(f"{path} is JSON but holds no scores: the field 'schema' is missing.")
        if content["schema"] != SCHEMA:
            raise ValueError(
                f"{path} has schema {content['schema']!r}, this version reads schema {SCHEMA}; "
                "use the version of lit-unlearn that wrote it, or test the run again."
            )
        try:
            return read_value(cls, content, "scores")
        except ValueError as error:
            raise ValueError(f"{path} is no valid file of scores: {error}") from error


def read_json(path: Path, origin: str) -> Any:
    """Read JSON.

    Args:
        path: The file.
        origin: What writes it, for the sentence that says that it is missing.

    Raises:
        ValueError: The file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}; {origin}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # covers broken JSON and broken UTF-8
        raise ValueError(f"{path} is not JSON ({error}); was it cut short or edited by hand?") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step: readers see the old file or the new one, and a failure leaves the old one.

    Args:
        path: The file to write.
        content: Anything of dictionaries, lists, numbers, texts, dataclasses, paths, tensors and arrays. Numbers that
            are not finite become null, JSON having no word for them.

    Raises:
        OSError: The file cannot be written; the message names it.
        TypeError: Something that has no form in JSON.
    """
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def _plain(content: Any) -> Any:
    """Return content as JSON can say it: None for nan and infinity, lists for tuples, tensors and arrays."""
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    if content is None or isinstance(content, str | int):
        return content
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if is_dataclass(content):
        return {f.name: _plain(getattr(content, f.name)) for f in fields(content)}
    if isinstance(content, os.PathLike):
        return os.fspath(content)
    if hasattr(content, "tolist"):
        return _plain(content.tolist())
    raise TypeError(f"{content!r} of type {type(content).__name__} has no form in JSON.")


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Make what the type ``hint`` says of a value from JSON.

    Args:
        hint: A type, a dataclass, or a list, tuple, dict or optional of such.
        value: From JSON.
        where: Name of the value for messages, to which those of its fields are added.

    Raises:
        ValueError: The value is something else; the message names the field.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # of one type and None
        (some,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else read_value(some, value, where)
    expected: Any = {dict: dict, list: list, tuple: list}.get(origin, hint)
    if is_dataclass(hint):
        expected = dict
    elif hint is float:
        expected = (float, int)
    if hint is not Any and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{where} is {value!r}, expected {hint.__name__ if origin is None else hint}.")
    if is_dataclass(hint):
        return _read_dataclass(hint, value, where)
    if origin is dict:
        return {key: read_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        return [read_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        if len(value) != len(arguments):
            raise ValueError(f"{where} is {value!r}, expected {len(arguments)} values.")
        return tuple(read_value(argument, item, where) for argument, item in zip(arguments, value, strict=True))
    return value


def _read_dataclass(kind: Any, content: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}; its fields are {', '.join(known)}.")
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{where} lacks the field {missing[0]!r}.")
    hints = get_type_hints(kind)
    return kind(**{name: read_value(hints[name], value, f"{where}.{name}") for name, value in content.items()})
