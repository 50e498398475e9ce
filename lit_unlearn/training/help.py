"""``lit-unlearn fit --help``: a recipe's own keys first, read from source files without importing PyTorch."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_unlearn.system.sources import Argument, arguments_of, our_classes, trainer_options
from lit_unlearn.training.arguments import LIGHTNINGS, OPTIONS
from lit_unlearn.training.early import Asked

WHAT = {"model": "The method", "edit": "The closed form", "data": "The prompts or pictures", "trainer": "The trainer"}
USUAL = ("max_epochs", "max_steps", "max_time", "accelerator", "devices", "precision", "default_root_dir", "callbacks")
"""Options of the trainer that are shown; ``--help all`` shows the others."""
EXAMPLE = "null_space.yaml"
LINKED = {"concept", "seed", "concept_set"}
"""Arguments that take their value from another option, except the model's ``concept_set``."""


def wants_help(args: Sequence[str]) -> bool:
    """Whether a command line asks for the short help; ``--help all`` asks for the parser's."""
    places = [number for number, arg in enumerate(args) if arg in ("-h", "--help")]
    return bool(places) and list(args[places[0] + 1 : places[0] + 2]) != ["all"]


def command_help(command: str, what: str, args: Sequence[str]) -> str:
    """The help of a command of the trainer.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        what: What it does, in a few words.
        args: The options; recipes as paths. The keys of their method are shown.
    """
    asked = Asked.of([arg for arg in args if arg not in ("-h", "--help")])
    lines = [
        f"usage: lit-unlearn {command} --config RECIPE [--concept NAME] [options]",
        "",
        f"{what.capitalize()}.",
        "",
    ]
    for section in ("model", "edit", "data"):
        kind = asked.kind(section)
        arguments = arguments_of(kind) if kind is not None else None
        if kind is None or not arguments:
            continue
        title = f"{WHAT[section]} ({kind}): {our_classes()[kind].summary}".replace("``", "")
        lines += textwrap.wrap(title, _width())
        own = asked.init_args(section)
        shown = [
            one
            for one in arguments.values()
            if one.name not in LINKED or (section, one.name) == ("model", "concept_set")
        ]
        for one in shown:
            lines += _item(f"--{section}.{one.name}", one.help, own.get(one.name, _default(one)))
        lines.append("")
    if asked.kind("model") is None:
        lines += [f"The keys of a method: lit-unlearn {command} --config {EXAMPLE} --help", ""]
    lines.append("The command:")
    for name, text in LIGHTNINGS.items():
        lines += _item(f"--{name}", text)
    for option in OPTIONS:
        lines += _item(f"--{option.name}", option.help)
    lines += ["", "The trainer, the most used:"]
    trainer = trainer_options()
    for one in (trainer[name] for name in USUAL if name in trainer):
        lines += _item(f"--trainer.{one.name}", one.help.split(". ")[0].replace("Default: None", ""))
    lines += ["", f"All options: lit-unlearn {command} --help all"]
    return "\n".join(lines)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _default(argument: Argument) -> Any:
    return None if argument.default in (None, "None") else argument.default.strip("'")


def _item(name: str, text: str, value: Any = None) -> Iterable[str]:
    """An option and what it does, wrapped at the terminal's width; ``value`` is the recipe's or the default."""
    if value is not None and not isinstance(value, Mapping):
        text = f"{text.rstrip('.')} [{value}]"
    lines = textwrap.wrap(text, _width() - 30) or [""]
    if len(name) > 26:
        return [f"  {name}", *(f"{'':29} {line}" for line in lines)]
    return [f"  {name:27} {lines[0]}", *(f"{'':29} {line}" for line in lines[1:])]
