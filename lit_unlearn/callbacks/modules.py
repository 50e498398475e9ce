"""Which module a callback belongs to."""

from __future__ import annotations

import lightning as L


def expect_module(callback: L.Callback, module: L.LightningModule, kind: type[L.LightningModule], does: str) -> None:
    """Refuse a module that ``callback`` can do nothing for.

    Args:
        callback: The callback.
        module: The module of the recipe.
        kind: The modules that it belongs to.
        does: What it does, as in ``writes what ESD learns``.

    Raises:
        ValueError: The module is of another kind.
    """
    if not isinstance(module, kind):
        raise ValueError(
            f"{type(callback).__name__} {does}, but the module is {type(module).__name__}: "
            "take it out of trainer.callbacks."
        )
