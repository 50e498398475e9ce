"""Finds attacks: the ones of this package by name, any other by its import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lit_unlearn import attacks
from lit_unlearn.attacks.base import Attack
from lit_unlearn.system.classes import CLASS_PATH, checked_arguments, declared_classes, import_class
from lit_unlearn.system.errors import closest


def shipped_attacks() -> dict[str, type[Attack]]:
    """The attacks of this package by their names."""
    return declared_classes(attacks, Attack, "name")  # type: ignore[type-abstract]


def find_attack(attack: str) -> type[Attack]:
    """The class that ``attack`` names.

    Raises:
        ValueError: There is no such attack.
    """
    shipped = shipped_attacks()
    if attack in shipped:
        return shipped[attack]
    if not CLASS_PATH.fullmatch(attack):
        others = f" (attacks: {', '.join(shipped)}, or the import path of a class)"
        raise ValueError(f"attacks={attack!r} is no attack{closest(attack, shipped) or others}.")
    found = import_class(attack, "attacks")
    if not issubclass(found, Attack) or inspect.isabstract(found):
        raise ValueError(f"attacks={attack!r} is no attack: it needs to be a subclass of Attack that has a search.")
    name = getattr(found, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"attacks={attack!r} declares no name: give the class a name such as my_attack.")
    if shipped.get(name, found) is not found:
        raise ValueError(f"attacks={attack!r} is called {name}, as one of ours is: give the class a name of its own.")
    return found


def make_attacks(
    names: Sequence[str] | None = None,
    steps: int | None = None,
    allow_names: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    budget: float | None = None,
) -> list[Attack]:
    """Make attacks, with their default settings except for the settings given here.

    Args:
        names: Names or import paths of the attacks; None for all attacks of this package.
        steps: Steps of each attack; None for each attack's default.
        allow_names: Whether searched prompts may contain the concept's own names.
        settings: Fields of each attack, by its name; they override ``steps`` and ``allow_names``.
        budget: Factor of the default steps of each attack, instead of ``steps``.

    Raises:
        ValueError: A name is unknown or given twice, a setting is wrong or for an attack that is not chosen, ``steps``
            is less than 1, or ``budget`` is not positive or given beside steps.
    """
    classes = [find_attack(name) for name in (shipped_attacks() if names is None else names)]
    chosen = {cls.name: cls for cls in classes}
    if len(chosen) < len(classes):
        raise ValueError(f"attacks={' '.join(names or ())} names one twice.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    for name in settings or {}:
        if name not in chosen:
            raise ValueError(
                f"{name}.{next(iter((settings or {})[name]))} is given, and {name} is not among the attacks"
                f"{closest(name, chosen)}: they are {', '.join(chosen)}."
            )
    if budget is not None:
        _check_steps(budget, steps, settings or {})
    if steps is not None and chosen and not any(_has(cls, "steps") for cls in classes):
        raise ValueError(f"steps={steps} has no effect on {', '.join(chosen)}: nothing is searched step by step there.")
    given: dict[str, Any] = {} if steps is None else {"steps": steps}
    if allow_names:
        given["exclude_names"] = False
        if chosen and not any(_has(cls, "exclude_names") for cls in classes):
            raise ValueError(f"allow_names has no effect on {', '.join(chosen)}: no words are searched there.")
    made = []
    for name, cls in chosen.items():
        own = checked_arguments(cls, (settings or {}).get(name, {}), name, name)
        usual = {field.name: field.default for field in fields(cls)}.get("steps")
        if budget is not None and isinstance(usual, int):
            given["steps"] = max(1, round(budget * usual))
        made.append(cls(**{**{key: value for key, value in given.items() if _has(cls, key)}, **own}))
    return made


def check_budget(attacks: Sequence[Attack], budget: float | None) -> list[str]:
    """A sentence about the attacks on which ``budget`` has no effect, if there are any.

    Raises:
        ValueError: It has no effect on any of ``attacks``.
    """
    if budget is None:
        return []
    others = [attack.name for attack in attacks if not hasattr(attack, "steps")]
    if others and len(others) == len(attacks):
        raise ValueError(f"budget={budget:g} has no effect on {', '.join(others)}, without steps: leave it out.")
    return [f"budget={budget:g} has no effect on {', '.join(others)}, without steps."] if others else []


def _check_steps(budget: float, steps: int | None, settings: Mapping[str, Mapping[str, Any]]) -> None:
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget:g} must be a positive number.")
    given = {} if steps is None else {"steps": steps}
    given |= {f"{name}.steps": own["steps"] for name, own in settings.items() if "steps" in own}
    for name, value in given.items():
        raise ValueError(f"budget={budget:g} multiplies the default steps, and {name}={value} sets them: give one.")


def _has(cls: type[Attack], name: str) -> bool:
    return any(field.name == name for field in fields(cls))
