"""What earlier versions wrote into checkpoints and deltas, in today's terms."""

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
"""Arguments of methods that are now those of a solver, by the method's class."""


def in_todays_terms(
    method: str, arguments: Mapping[str, Any], edit: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split what a file holds of a method into the method's arguments and the solver's.

    Args:
        method: Name of the method's class.
        arguments: Its arguments, as the file has them.
        edit: The solver and its settings, if the file says them.

    Returns:
        The arguments that the method takes today, and the solver with its settings; None if nobody knows them.
    """
    if edit is not None or method not in MOVED:
        return dict(arguments), edit
    solver, names = MOVED[method]
    moved = {name: arguments[name] for name in names if name in arguments}
    kept = {name: value for name, value in arguments.items() if name not in names}
    return kept, {"class_path": solver, "init_args": moved}
