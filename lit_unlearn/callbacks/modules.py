"""Checks that a callback is used with a module that it supports."""

from __future__ import annotations

import lightning as L


def expect_module(callback: L.Callback, module: L.LightningModule, kind: type[L.LightningModule], does: str) -> None:
    """Refuse a module that ``callback`` does not support.

    Args:
        callback: The callback.
        module: The module of the recipe.
        kind: Class of the modules that the callback supports.
        does: What the callback does, for the message, as in ``writes what ESD learns``.

    Raises:
        ValueError: The module is of another kind.
    """
    if not isinstance(module, kind):
        raise ValueError(
            f"{type(callback).__name__} {does}, but the module is {type(module).__name__}: "
            "take it out of trainer.callbacks."
        )
