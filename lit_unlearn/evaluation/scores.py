"""The scores of a run: ``scores.json``, what it holds and how it is written and read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_unlearn.system.json_files import plain, read_json, read_value, write_json

SCHEMA = 1
"""Version of ``scores.json``; raised when a field changes its meaning or goes."""

OWN_INTERVALS = {"adversarial": "forget_adversarial", "crosswise": "forget_crosswise"}
"""Names of intervals, where they are not those of their scores."""

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
    share_crosswise: float | None = None
    """Share of the judged pictures of the other edited concepts' prompts that show this one, if several are edited."""


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
    crosswise: float | None = None
    """Where several concepts are edited: share of the judged pictures of each one's prompts without each of the
    others. Two concepts that have changed places are forgotten, and crosswise is 0."""
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
            shares = {key: concept.get(key, math.nan) for key in ("share_with_concept", "share_crosswise")}
            judged = {key: None if math.isnan(share) else share for key, share in shares.items()}
            per_concept[name] = ConceptScore(**{**concept, **judged})
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
            crosswise=number("forget_crosswise"),
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
        content = plain(self)
        order = ("schema", "method", "backbone", "concepts", "edited", "judge", "images_per_concept", "seed")
        return {name: content[name] for name in (*order, *(name for name in content if name not in order))}

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
