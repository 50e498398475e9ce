"""``lit-unlearn completion``: a script with which bash or zsh completes commands and their options, by shtab."""

from __future__ import annotations

import argparse

from lit_unlearn.commands.parser import Parser, command_parser
from lit_unlearn.system.errors import UserError

DESCRIPTION = "print a script that completes commands in bash or zsh"


def parser() -> Parser:
    """Options of ``completion``."""
    made = command_parser("completion", DESCRIPTION)
    made.add_argument("shell", choices=("bash", "zsh"), help="the shell that reads the script")
    return made


def run(options: argparse.Namespace) -> None:
    """Print the script.

    Raises:
        UserError: shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install 'lit-unlearn[completion]'.") from error
    print(shtab.complete(whole_parser(), options.shell))


def whole_parser() -> argparse.ArgumentParser:
    """A parser of all commands with all their options; it completes, and does not parse."""
    from lit_unlearn.commands.registry import TRAINER_COMMANDS, command_modules
    from lit_unlearn.system.sources import trainer_options
    from lit_unlearn.training.arguments import LIGHTNINGS, OPTIONS
    from lit_unlearn.training.recipes import recipe_names

    whole = argparse.ArgumentParser(prog="lit-unlearn")
    commands = whole.add_subparsers(dest="command")
    for name, text in TRAINER_COMMANDS.items():
        made = commands.add_parser(name, help=text)
        made.add_argument("-c", "--config", choices=recipe_names(), help=LIGHTNINGS["config"])
        for option, what in LIGHTNINGS.items():
            if option != "config":
                made.add_argument(f"--{option}", help=what)
        for one in OPTIONS:
            made.add_argument(f"--{one.name}", help=one.help, action="store" if one.type else "store_true")
        for argument in trainer_options().values():
            made.add_argument(f"--trainer.{argument.name}", help=argument.help.replace("%", "%%"))
    for name, module in command_modules().items():
        own = module.parser()
        commands.add_parser(name, help=module.DESCRIPTION, parents=[own], add_help=False)
    return whole
