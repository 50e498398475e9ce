"""SPEED's closed form as a solver: the null space of the retained keys that an unconstrained edit would move most."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lit_unlearn.core.null_space import NullSpaceRule
from lit_unlearn.core.seeds import seeded
from lit_unlearn.core.solvers import Retained, Solved, Solver, Write, each
from lit_unlearn.core.speed import (
    augmented,
    erasing_update,
    most_influenced,
    relative_output,
    retained_null_space,
    speed_condition,
    speed_update,
)

ONLY_SPEED = (
    "RefinedNullSpace needs each retained key and the anchors' keys, which only SPEED provides: "
    "choose edit: NullSpace or RidgeMap."
)
"""Message that refuses other methods."""


class RefinedNullSpace(Solver):
    """Edits each matrix in the null space of its own refined retain set (SPEED).

    Args:
        threshold: Eigenvalues below it span the null space; see ``rule``.
        rule: What the threshold is relative to: ``absolute`` (on the mean second moment, as in the paper), ``mean`` or
            ``max`` eigenvalue, ``energy`` (fraction of the trace kept out), ``count`` (number of directions).
        minimum: Use at least this many directions, those with the smallest eigenvalues.
        retain_scale: Weight of the size of the edit.
        lamb: 0 keeps the outputs of the invariants exactly; a larger value allows some change.
        filter: Retain only texts that an unconstrained edit would move more than the mean (IPF).
        augment: Number of copies of each retained text, with noise that hardly changes the layer's output (DPA).

    Raises:
        ValueError: A setting is out of range.
        EmptyNullSpaceError: No eigenvalue is below the threshold.
    """

    remedy = "raise edit.retain_scale"

    def __init__(
        self,
        threshold: float = 1e-1,
        rule: NullSpaceRule = "absolute",
        minimum: int = 0,
        retain_scale: float = 1.0,
        lamb: float = 0.0,
        filter: bool = True,
        augment: int = 10,
    ) -> None:
        for field, value in {"threshold": threshold, "retain_scale": retain_scale}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"edit.{field}={value} must be a positive number.")
        if not (math.isfinite(lamb) and lamb >= 0):
            raise ValueError(f"edit.lamb={lamb} must be zero or a positive number.")
        for field, count in {"minimum": minimum, "augment": augment}.items():
            if count < 0:
                raise ValueError(f"edit.{field}={count} must be zero or larger.")
        self.threshold, self.rule, self.minimum = threshold, rule, minimum
        self.retain_scale, self.lamb = retain_scale, lamb
        self.filter, self.augment = filter, augment

    def check(self, retained: Retained) -> None:
        """Refuse a method that does not provide the retained keys themselves.

        Raises:
            ValueError: The method does not provide them.
        """
        if retained.keys is None:
            raise ValueError(ONLY_SPEED)

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """See ``Solver.solve``."""
        return each(writes, self._solve)

    def _solve(self, write: Write) -> Solved:
        weight, keys, retained, anchors = write.weight, write.keys, write.retained.keys, write.anchors
        if retained is None or anchors is None or write.anchor_weight is not None:
            raise ValueError(ONLY_SPEED)
        invariants = write.retained.invariants
        erasing = erasing_update(weight, keys, anchors, write.texts)
        kept = retained
        if self.filter:
            kept = kept[most_influenced(kept, erasing)]
        copies = augmented(kept, weight, self.augment, seeded(*write.seed))
        if len(copies):  # the reference code filters the copies even without ``filter``
            copies = copies[most_influenced(copies, erasing)]
        free = retained_null_space(torch.cat([kept, copies]), self.threshold, self.rule, self.minimum)
        settings = self.retain_scale, self.lamb, write.texts
        change = speed_update(weight, keys, anchors, free, invariants, *settings)
        rounded = write.rounded(change)
        report = {
            "kept": len(kept),
            "augmented": len(copies),
            "null_space_dimension": free.dimension,
            "keys_kept": float((keys @ free.basis).norm() / keys.norm()),
            "leak": relative_output(rounded, weight, retained),
            "kept_leak": relative_output(rounded, weight, kept),
            "relative_norm": float(rounded.norm() / weight.norm()),
            "condition_number": speed_condition(keys, free, self.retain_scale, write.texts),
        }
        wished = (anchors - keys) @ weight.mT
        report["remaining_error"] = float((wished - keys @ rounded.mT).norm() / wished.norm())
        if invariants is not None:
            report["invariants_leak"] = relative_output(rounded, weight, invariants)
        return Solved(change, report)
