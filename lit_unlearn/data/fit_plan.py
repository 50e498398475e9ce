"""What a method asks of the data and of the trainer, before a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class FitPlan:
    """A method's wishes; with none of them, recipe and data decide.

    Attributes:
        epochs: How many epochs the fit has; None: as the trainer says.
        steps: Steps of an epoch; None: as the data says.
        num_pairs: Pairs that are edited, if they are not the concept set's pairs of edit and target prompts.
        seed: Seed of the order of pairs and pictures.
        draws_from_all: Whether pictures to keep are drawn from those to forget as well.
    """

    epochs: int | None = None
    steps: int | None = None
    num_pairs: int | None = None
    seed: int = 0
    draws_from_all: bool = False


@runtime_checkable
class HasFitPlan(Protocol):
    """A module that has wishes."""

    @property
    def fit_plan(self) -> FitPlan:
        """The wishes."""
        ...


def fit_plan_of(trainer: Any) -> FitPlan:
    """The plan of the module of ``trainer``, a Lightning trainer or None; one without wishes if it has none."""
    module = trainer and trainer.lightning_module
    return module.fit_plan if isinstance(module, HasFitPlan) else FitPlan()
