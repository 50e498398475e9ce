"""Translates the arguments in checkpoints and deltas of earlier versions into today's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "UCE": ("RidgeMap", ("erase_scale", "preserve_scale", "lamb")),
    "UCEDebias": ("RidgeMap", ("erase_scale", "preserve_scale", "lamb")),
    "SPEED": (
        "RefinedNullSpace",
        ("threshold", "rule", "minimum", "retain_scale", "lamb", "filter", "augment"),
    ),
}
"""Arguments that moved from a method to its solver, by the method's class."""


def in_todays_terms(
    method: str, arguments: Mapping[str, Any], edit: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split the arguments in a file into the method's and the solver's.

    Args:
        method: Name of the method's class.
        arguments: Its arguments in the file.
        edit: The solver and its settings, if they are in the file.

    Returns:
        The arguments that the method takes today, and the solver with its settings; None if the solver is unknown.
    """
    if edit is not None or method not in MOVED:
        return dict(arguments), edit
    solver, names = MOVED[method]
    moved = {name: arguments[name] for name in names if name in arguments}
    kept = {name: value for name, value in arguments.items() if name not in names}
    return kept, {"class_path": solver, "init_args": moved}
