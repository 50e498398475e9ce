"""The names of all commands; importing it loads none of them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

TRAINER_COMMANDS = {
    "fit": "find and apply an edit, or train a part of the embedded model",
    "validate": "draw a few pictures with a run's edited weights",
    "test": "score a run: pictures before and after, judged",
    "predict": "draw the evaluation pictures with a run's edited weights",
}
OTHER_COMMANDS = (
    *("erase", "concepts", "plan", "generate", "compare", "app", "attack", "export", "undo", "verify", "convert"),
    *("runs", "report", "demo", "doctor", "completion"),
)
"""Each one is a file in ``lit_unlearn/commands``."""


def command_modules() -> dict[str, ModuleType]:
    """The modules of ``OTHER_COMMANDS``; none of them imports PyTorch before it runs."""
    return {name: import_module(f"lit_unlearn.commands.{name}") for name in OTHER_COMMANDS}
