"""The scores of a run: the content of ``scores.json``, which is written and read here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.system.json_files import plain, read_json, read_value, write_json

SCHEMA = 1
"""Version of ``scores.json``; raised when a field is removed or changes its meaning."""

OWN_INTERVALS = {"adversarial": "forget_adversarial", "crosswise": "forget_crosswise"}
"""Names of intervals that differ from the names of their scores."""

AnyMeasurement = TypeVar("AnyMeasurement", bound="Measurement")


@dataclass(frozen=True)
class ConceptScore:
    """The judge's verdicts on the pictures of one concept's prompts."""

    share_with_concept: float | None
    """Share of the judged pictures that show the concept; None if none was judged."""
    n: int
    """Number of judged pictures."""
    missing: int
    """Number of pictures without a verdict: not judged, or without an answer of the judge."""
    edited: bool
    failed: int = 0
    """Number of missing pictures that the judge saw but did not answer."""
    share_crosswise: float | None = None
    """If several concepts are edited: share of the judged pictures of the others' prompts that show this concept."""
    share_spontaneous: float | None = None
    """If it is edited: share of the judged pictures of retained prompts that do not name it and still show it."""


@dataclass(frozen=True)
class Part:
    """Forget and retain score over some of the prompts; None where no picture was judged."""

    forget: float | None
    retain: float | None


@dataclass(frozen=True)
class Source:
    """Origin of a model or a set, with the SHA-256 of its content (None if unknown, e.g. for a hub id)."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of an edit."""

    seconds: float
    unet_forwards: int
    """Pictures or latents that passed through the UNet; with classifier-free guidance each counts twice."""
    peak_memory_bytes: int | None = None
    unet_backwards: int = 0
    """Number of these forward passes that also had a backward pass, which costs about two forward passes."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The judge's results for one model: the fields that the edited and the unedited model have in common."""

    forget: float | None
    """Share of the edited concepts' judged pictures without their concept; None if none was judged."""
    retain: float | None
    """Share of the other concepts' judged pictures with their concept; None if none was judged."""
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
    """As forget, over the adversarial prompts, which do not count in other scores."""
    crosswise: float | None = None
    """If several concepts are edited: share of the judged pictures of each concept's prompts that do not show any of
    the others. If two concepts have changed places, forget is 1 and crosswise is 0."""
    spontaneous: float | None = None
    """Share of yes when the judge is asked about each edited concept on pictures of retained prompts that do not name
    it; None if it was not asked."""
    err: float | None = None
    """Harmonic mean of forget on direct prompts, retain, adjacent, forget on indirect and on adversarial prompts."""

    @classmethod
    def from_metric(cls: type[AnyMeasurement], result: Mapping[str, Any], **provenance: Any) -> AnyMeasurement:
        """Make it from the result of ``ForgetRetain.compute``.

        Args:
            result: The computed scores; nan becomes None.
            **provenance: The other fields of ``Scores``, when called on that class.

        Returns:
            The scores.
        """

        def number(name: str) -> float | None:
            value = result.get(name, math.nan)
            return None if math.isnan(value) else float(value)

        per_concept = {}
        for name, concept in result["per_concept"].items():
            names = ("share_with_concept", "share_crosswise", "share_spontaneous")
            shares = {key: concept.get(key, math.nan) for key in names}
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
            spontaneous=number("spontaneous"),
            err=number("err"),
            **provenance,
        )


@dataclass(frozen=True)
class Relapse:
    """How much of the concepts that earlier runs have edited comes back."""

    concepts: list[str]
    """Their names."""
    share: float | None
    """Share of the judged pictures of their prompts that show their concept; None if none was judged."""
    interval: tuple[float, float]
    """Wilson's interval of the share, at 95 %."""

    @classmethod
    def of(cls, concepts: Sequence[str], per_concept: Mapping[str, Mapping[str, Any]]) -> Relapse | None:
        """From the entries ``per_concept`` of ``ForgetRetain.compute``; None without ``concepts``."""
        if not concepts:
            return None
        own = [per_concept[name] for name in concepts if per_concept[name]["n"]]
        judged = sum(int(entry["n"]) for entry in own)
        shown = sum(round(float(entry["share_with_concept"]) * int(entry["n"])) for entry in own)
        return cls(list(concepts), shown / judged if judged else None, wilson_interval(shown, judged))


@dataclass(frozen=True)
class Drawn:
    """How a test has drawn its pictures."""

    device: str
    """The device's name, such as ``the processor`` or ``NVIDIA H100``."""
    precision: str
    """The trainer's precision, such as ``32-true`` or ``bf16-mixed``."""
    weights: str
    """Type of the denoiser's weights, such as ``float32``."""
    num_inference_steps: int
    guidance_scale: float
    compiled: bool = False
    """Whether ``torch.compile`` has made the kernels."""


@dataclass(frozen=True, kw_only=True)
class Scores(Measurement):
    """The content of ``scores.json``: the scores of a run, and what is needed to interpret and repeat them."""

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
    """Seed of the pictures."""
    training_seed: int | None = None
    """``seed_everything`` of the fit; None if the method draws nothing at random."""
    before: Measurement | None = None
    """The unedited model on the same prompts and seeds: the lower bound of forget and the upper bound of retain."""
    cost: Cost | None = None
    edit: dict[str, Any] = field(default_factory=dict)
    """The method's report about its edit, e.g. the null space of each layer."""
    drift: dict[str, Any] | None = None
    """How much pictures of unrelated prompts have changed, with the same seeds."""
    agreement: dict[str, Any] | None = None
    """Name of the second judge, and Cohen's kappa of both judges' verdicts on the same pictures."""
    calibration: dict[str, Any] | None = None
    """How well the judge distinguishes the unedited model's pictures of each edited concept from pictures of other
    concepts of its kind: the numbers of ``lit_unlearn.evaluation.judge_curve.Curve`` by concept."""
    drawn: Drawn | None = None
    """How the pictures were drawn; None in files of earlier versions."""
    relapse: Relapse | None = None
    """The concepts that earlier runs have edited; None if there are none (``fit --after``)."""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, as in ``scores.json``."""
        content = plain(self)
        order = ("schema", "method", "backbone", "concepts", "edited", "judge", "images_per_concept", "seed")
        return {name: content[name] for name in (*order, *(name for name in content if name not in order))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``scores.json``; if writing fails, an earlier file is kept."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a ``scores.json``.

        Args:
            path: The file.

        Returns:
            The scores.

        Raises:
            ValueError: The file is missing, is not JSON, has another schema, or a field is missing or misspelt.
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
