"""Concept unlearning for text-to-image diffusion models, as PyTorch Lightning recipes.

Importing the package loads nothing heavy: the names below are imported when they are first used. ``lit_unlearn.api``
says what they do and how data flow between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["ConceptSet", "Edit", "Pipeline", "UserError", "attack", "draw", "edit", "export", "grid", "score", "undo"]

if TYPE_CHECKING:
    from lit_unlearn.api import Edit, attack, draw, edit, export, grid, score, undo
    from lit_unlearn.data.concepts import ConceptSet
    from lit_unlearn.diffusion.pipeline import Pipeline
    from lit_unlearn.system.errors import UserError
else:

    def __getattr__(name: str) -> object:
        """Import a public name at its first use."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from lit_unlearn.system.environment import prepare_libraries

        prepare_libraries()
        of_others = {"ConceptSet": "data.concepts", "Pipeline": "diffusion.pipeline", "UserError": "system.errors"}
        found = getattr(import_module(f"{__name__}.{of_others.get(name, 'api')}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """The public names, for completion."""
        return sorted({*globals(), *__all__})
