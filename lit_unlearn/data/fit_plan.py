"""Settings of the data and of the trainer that a method sets before a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class FitPlan:
    """Settings that a method needs; for None the recipe and the data decide.

    Attributes:
        epochs: Number of epochs of the fit; None takes the trainer's.
        steps: Steps per epoch; None takes the data module's.
        num_pairs: Number of pairs to edit; None takes the concept set's pairs of edit and target prompts.
        seed: Seed of the order of pairs and pictures.
        draws_from_all: Whether pictures to keep are also drawn from the pictures to forget.
    """

    epochs: int | None = None
    steps: int | None = None
    num_pairs: int | None = None
    seed: int = 0
    draws_from_all: bool = False


@runtime_checkable
class HasFitPlan(Protocol):
    """A module that has a fit plan."""

    @property
    def fit_plan(self) -> FitPlan:
        """The fit plan."""
        ...


def fit_plan_of(trainer: Any) -> FitPlan:
    """The fit plan of the module of ``trainer`` (a Lightning trainer or None); the default plan if there is none."""
    module = trainer and trainer.lightning_module
    return module.fit_plan if isinstance(module, HasFitPlan) else FitPlan()
