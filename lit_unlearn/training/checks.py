"""What is refused of a recipe before anything is built."""

from __future__ import annotations

from typing import Any

from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.system.errors import UserError


def check_edit(method: type, edit: Any, callbacks: Any) -> None:
    """Refuse a method that a closed form writes and a recipe without one, and the other way round.

    Args:
        method: Class of the method.
        edit: The recipe's ``edit``, or None.
        callbacks: Those of the recipe's trainer, which may have a ``ClosedFormEdit`` of their own.

    Raises:
        UserError: They do not belong together.
    """
    named = [callbacks] if callbacks is not None and not isinstance(callbacks, list) else callbacks or []
    given = edit is not None or any(str(one.get("class_path", "")).endswith("ClosedFormEdit") for one in named)
    if issubclass(method, ClosedFormMethod) and not given:
        raise UserError(
            f"fit: {method.__name__} finds what to write, and nothing in the recipe writes it: add the key edit, "
            "such as edit: {class_path: NullSpace}, or pass --edit NullSpace."
        )
    if not issubclass(method, ClosedFormMethod) and edit is not None:
        raise UserError(f"fit: edit has no effect on {method.__name__}, which trains its weights: leave it out.")
