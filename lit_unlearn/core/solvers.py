"""The closed forms as solvers: each has settings, takes a method's writes to some weights, and returns the changes.

    edit: {class_path: NullSpace, init_args: {threshold: 0.01, ridge: 100}}      # in a recipe
    ClosedFormEdit(NullSpace(threshold=0.01, ridge=100))                         # in Python

A method says *what* to write: for each linear map its keys K1, the values V1 that they should get, and what should not
change (``Write``, ``Retained``). A solver says *how*: every solver works with every method that provides what it needs.
Rows are samples, as in ``closed_form``; everything is solved in float64 (``system.devices`` decides where).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import LeastSquaresSystem, least_squares_update, second_moment
from lit_unlearn.core.key_sums import MANY, KeySums
from lit_unlearn.core.matrices import SingularSystemError
from lit_unlearn.core.null_space import EmptyNullSpaceError, NullSpaceBasis
from lit_unlearn.core.retained_outputs import leak
from lit_unlearn.core.thin import Moment, NullSpaceOfKeys, dense
from lit_unlearn.core.uce import SharedReport, map_condition, map_report, map_updates, shared_map

Share = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""Calls each function on one process and sends the results to all processes: ``Processes.solved_once``."""


class UnsolvableError(ValueError):
    """A closed form that cannot be solved; the message names the weight."""


@contextmanager
def naming_weight(name: str, hint: str = "") -> Iterator[None]:
    """Add the name of the weight to errors that a closed form raises in the block.

    Args:
        name: Full name of the weight.
        hint: A sentence that says which setting the ridge of a singular system is.

    Raises:
        UnsolvableError: Keys, values or a moment are not finite, or the system is singular.
        EmptyNullSpaceError: As the block raises it, unchanged, since its message is complete.
    """
    try:
        yield
    except (EmptyNullSpaceError, UnsolvableError):
        raise
    except ValueError as error:
        more = f" {hint}" if hint and isinstance(error, SingularSystemError) else ""
        raise UnsolvableError(f"{name}: {error}{more}") from error


@dataclass(frozen=True, eq=False)
class Retained:
    """What a linear map should leave as it is; maps with the same inputs share one object.

    Attributes:
        moment: K0 K0ᵀ, the sum over the retained keys, (d_in, d_in), float64, or the keys themselves as a
            ``ThinMoment`` where they are few and the inputs many; None if nothing is retained.
        count: Number of retained keys.
        keys: The keys themselves, (n, d_in), for solvers that need each of them.
        invariants: Keys whose outputs must not change at all, (k, d_in), for solvers that support this.
        prompts: Number of prompts that the keys come from, the empty one counted.
        largest_norm: Length of the longest key, which bounds the keys of the reach; None if it is not known.
    """

    moment: Moment | None = None
    count: int = 0
    keys: Tensor | None = None
    invariants: Tensor | None = None
    prompts: int = 0
    largest_norm: float | None = None


@dataclass(frozen=True, eq=False)
class Write:
    """What a method wants to change in one linear map.

    Attributes:
        name: Full name of its weight.
        weight: W before the change, (d_out, d_in), float64.
        dtype: Type that the new weight is rounded to.
        keys: K1, (m, d_in), of any float type.
        values: V1, the outputs that the keys should get, (m, d_out), of any float type; None: the outputs of
            ``anchors``, which no solver then computes without need. Read them with ``wanted``.
        retained: What should not change.
        anchors: Keys that have V1 as outputs, row by row with ``keys``, (m, d_in); maps that share them share one
            tensor.
        anchor_weight: The weight whose outputs of ``anchors`` V1 is, (d_out, d_in), of any float type; None:
            ``weight``. Further rounds have that of the first one.
        texts: Number of texts that the keys come from, if a text has several keys; None: one key per text.
        seed: Seed of the random numbers that a solver draws for this map.
        concept_keys: Which of ``keys`` may carry the concept, (m,) bool; None: all.
        shared: Whether later solves have this very tensor of keys too, so that what they share is worth its memory.
    """

    name: str
    weight: Tensor
    dtype: torch.dtype
    keys: Tensor
    values: Tensor | None
    retained: Retained
    anchors: Tensor | None = None
    anchor_weight: Tensor | None = None
    texts: int | None = None
    seed: tuple[object, ...] = ()
    concept_keys: Tensor | None = None
    shared: bool = False

    def wanted(self, rows: Tensor | None = None) -> Tensor:
        """V1 (m, d_out), or the rows of it with the numbers ``rows`` (r,).

        Raises:
            ValueError: The write has neither values nor anchors.
        """
        given = self.anchors if self.values is None else self.values
        if given is None:
            raise ValueError(f"{self.name} is written without values: give values, or anchors that have them.")
        given = given if rows is None else given[rows.to(given.device)]
        if self.values is not None:
            return given
        weight = self.weight if self.anchor_weight is None else self.anchor_weight.to(self.weight)
        return given.to(self.weight) @ weight.mT

    def rounded(self, change: Tensor) -> Tensor:
        """The part of ``change`` that remains when the new weight is rounded to ``dtype``, (d_out, d_in), float64."""
        return (self.weight + change).to(self.dtype).double() - self.weight


def sums_of(
    write: Write, weight: Tensor | None = None, moment: Tensor | None = None, moved: Tensor | None = None
) -> KeySums | None:
    """Sums over the edited keys of ``write``, or None if there are so few keys that they need less memory.

    Args:
        write: The write.
        weight: The weight that the residual is taken from, (d_out, d_in), float64; None: that of ``write``.
        moment: ``KeySums.moment`` of these keys, if it is known already.
        moved: ``KeySums.moved`` of these keys and anchors, likewise.

    Raises:
        ValueError: As in ``KeySums.of``.
    """
    if len(write.keys) <= MANY * write.keys.shape[-1]:
        return None
    start = write.weight if weight is None else weight
    if write.values is not None or write.anchors is None:
        return KeySums.of(start, write.keys, write.wanted(), moment)
    own = write.weight if write.anchor_weight is None and weight is not None else write.anchor_weight
    return KeySums.of_anchors(start, write.keys, write.anchors, own, moment, moved)


class Solved(NamedTuple):
    """The change of one weight, (d_out, d_in), float64, and numbers to report about it.

    It is a tuple so that the code which exchanges results between processes finds the tensor and copies it to the CPU.
    """

    change: Tensor
    report: dict[str, float]


class Solver(ABC):
    """Base of the solvers; their settings are the arguments of their classes."""

    remedy: str = "raise edit.ridge"
    """Advice for a system that is ill-conditioned."""
    hint: str = ""
    """A sentence that says which setting the ridge of a singular system is."""

    def settings(self) -> dict[str, Any]:
        """The class and its arguments, in the form of the recipe's key ``edit``."""
        arguments = inspect.signature(type(self)).parameters
        return {"class_path": type(self).__name__, "init_args": {name: getattr(self, name) for name in arguments}}

    def prepare(
        self,
        retained: Mapping[str, Retained],
        share: Share,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Mapping[Retained, NullSpaceOfKeys]:
        """Compute what all solves share.

        Args:
            retained: What should not change, by the name of the weight.
            share: Divides the work among processes.
            device: Device of the weights.
            weights: The weights as they are now, by name, if something of them is worth computing once.

        Returns:
            Null spaces whose spectra should be plotted, if there are any.

        Raises:
            UnsolvableError: The retained keys are not finite, or this solver needs others.
            EmptyNullSpaceError: The null space of the retained keys is empty.
        """
        for name, own in retained.items():
            with naming_weight(name):
                self.check(own)
        return {}

    @abstractmethod
    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """Solve for ``writes``, which are applied together.

        Raises:
            ValueError: Keys or values are not finite, or a system is singular.
            EmptyNullSpaceError: The null space of the retained keys is empty.
        """

    def forget(self) -> None:  # noqa: B027 - most solvers keep nothing
        """Release what was kept for further solves: the last one is done."""

    def null_space_of(self, retained: Retained) -> NullSpaceBasis | Tensor | None:
        """The null space that all edits of maps with these retained keys stay within; None if there is none.

        It may be given by orthonormal columns (d_in, k) that span all directions across it.
        """
        return None

    def check(self, retained: Retained) -> None:
        """Refuse retained keys that this solver cannot use, before the method has done any work.

        Raises:
            ValueError: Something that the solver needs is missing.
        """
        if retained.moment is None:
            raise ValueError(
                f"{type(self).__name__} needs the second moment of retained keys, but the method retains nothing: "
                "set model.preserve, or choose edit: RidgeMap."
            )


def each(writes: Sequence[Write], solve: Callable[[Write], Solved]) -> list[Solved]:
    """Call ``solve`` for each of ``writes``; errors name the weight."""
    solved = []
    for write in writes:
        with naming_weight(write.name):
            solved.append(solve(write))
    return solved


class LeastSquares(Solver):
    """Edits by least squares over retained and edited keys, without a projector (paper, Eq. 6; MEMIT).

    Args:
        ridge: Weight of the penalty on the size of the edit.
        retain_weight: Weight of the retained keys' second moment; MEMIT's lambda, 15000 on language models.
        moment: Second moment as the ``sum`` over the retained keys (Eq. 6), or as their ``mean`` (MEMIT).

    Raises:
        ValueError: A weight is negative, or ``moment`` is neither ``sum`` nor ``mean``.
    """

    def __init__(self, ridge: float = 1e-2, retain_weight: float = 1.0, moment: Literal["sum", "mean"] = "sum") -> None:
        for field, value in {"ridge": ridge, "retain_weight": retain_weight}.items():
            if not value >= 0:
                raise ValueError(f"edit.{field}={value} must be zero or larger.")
        if moment not in ("sum", "mean"):
            raise ValueError(f"edit.moment={moment!r} is unknown: choose sum or mean.")
        self.ridge, self.retain_weight, self.moment = ridge, retain_weight, moment

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """See ``Solver.solve``."""
        return each(writes, self._solve)

    def _solve(self, write: Write) -> Solved:
        self.check(write.retained)
        assert write.retained.moment is not None
        total = dense(write.retained.moment).to(write.weight)
        moment = total if self.moment == "sum" else total / write.retained.count
        sums = sums_of(write)
        edited = second_moment(write.keys.to(write.weight.device)) if sums is None else sums.moment
        system = LeastSquaresSystem(edited, moment, self.ridge, self.retain_weight)
        if sums is None:
            settings = moment, self.ridge, self.retain_weight
            change = least_squares_update(write.weight, write.keys, write.wanted(), *settings, system=system)
        else:
            change = system.solve(sums.residual)
        delta, weight = write.rounded(change), write.weight
        report = {
            "leak": leak(delta, weight, total),
            "relative_norm": float(delta.norm() / weight.norm()),
            "condition_number": system.condition_number,
        }
        return Solved(change, report)


class RidgeMap(Solver):
    """Unified Concept Editing: maps keys to values and keeps the preserved keys' outputs and the weight near the old.

    Args:
        erase_scale: s_e, weight of the edited keys.
        preserve_scale: s_p, weight of the preserved keys; null takes the larger of 0.1 and 1 / number of preserved
            prompts (code of 2023).
        lamb: λ, pull of each weight towards its value before the edit.

    Raises:
        ValueError: A weight is not positive.
    """

    remedy = "raise edit.lamb"
    hint = "The ridge is edit.lamb / edit.erase_scale."

    def __init__(self, erase_scale: float = 1.0, preserve_scale: float | None = 1.0, lamb: float = 0.5) -> None:
        for field, value in {"erase_scale": erase_scale, "lamb": lamb}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"edit.{field}={value} must be a positive number: it weighs a term of the objective.")
        if preserve_scale is not None and not 0 <= preserve_scale < float("inf"):
            raise ValueError(f"edit.preserve_scale={preserve_scale} must be zero or larger: 0 preserves nothing.")
        self.erase_scale, self.preserve_scale, self.lamb = erase_scale, preserve_scale, lamb

    def check(self, retained: Retained) -> None:
        """Accept any retained keys, also none."""

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """See ``Solver.solve``; maps with the same keys and the same preserved keys are solved together."""
        groups: dict[tuple[int, int | None, Retained], list[Write]] = {}
        for write in writes:
            anchors = id(write.anchors) if write.values is None else None
            groups.setdefault((id(write.keys), anchors, write.retained), []).append(write)
        solved: dict[Write, Solved] = {}
        for group in groups.values():
            with naming_weight(group[0].name if len(group) == 1 else "The cross-attention", self.hint):
                solved |= dict(zip(group, self._solve(group), strict=True))
        return [solved[write] for write in writes]

    def _solve(self, writes: Sequence[Write]) -> list[Solved]:
        keys, retained, anchors = writes[0].keys, writes[0].retained, writes[0].anchors
        scale = self.preserve_scale
        if scale is None:
            scale = max(0.1, 1 / max(1, retained.prompts))
        moment = None if retained.moment is None else dense(retained.moment)
        settings = moment, self.erase_scale, scale, self.lamb
        condition = map_condition(keys, *settings)  # all maps share one system
        own = all(write.anchor_weight is None for write in writes)
        if own and writes[0].values is None and anchors is not None:
            mapped = shared_map(keys, anchors, *settings)
            changes = [mapped.change(write.weight) for write in writes]
            report = SharedReport(keys, anchors, moment, retained.keys)
            reports = [
                report.of(write.weight, write.rounded(change)) for write, change in zip(writes, changes, strict=True)
            ]
        else:
            targets = [write.wanted() for write in writes]
            changes = map_updates([write.weight for write in writes], keys, targets, *settings)
            reports = [
                map_report(write.weight, write.rounded(change), keys, values, moment)
                for write, change, values in zip(writes, changes, targets, strict=True)
            ]
        return [
            Solved(change, {**report, "condition_number": condition})
            for change, report in zip(changes, reports, strict=True)
        ]
