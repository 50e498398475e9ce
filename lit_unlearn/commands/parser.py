"""Parsers of commands, which leave it to ``main`` to report errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lit_unlearn.system.errors import UserError, closest
from lit_unlearn.system.names import check_output_name, check_path


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves it to ``main`` to report errors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError``."""
        known = ""
        if message.startswith("unrecognized arguments: -"):
            given = message.split()[2].partition("=")[0]
            known = closest(given, [name for action in self._actions for name in action.option_strings])
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}{known}.")


class Once(argparse.Action):
    """Keeps the value of an option that names one thing, and refuses a second one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keep ``values``."""
        given: set[str] = getattr(namespace, "given_once", set())
        if self.dest in given:
            parser.error(f"{option} is given twice and takes one value")
        namespace.given_once = {*given, self.dest}
        setattr(namespace, self.dest, values)


class Listing(argparse.Action):
    """An option that prints what there is and ends the program.

    Args:
        listing: Makes the text; what takes seconds to import is imported there.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, listing: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self.listing = listing

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        """Print it."""
        parser._print_message(f"{self.listing()}\n", sys.stdout)  # as its help, which a reader may cut off
        parser.exit()


def command_parser(command: str, description: str, kind: type[Parser] = Parser) -> Parser:
    """An empty parser of ``lit-unlearn COMMAND``."""
    return kind(prog=f"lit-unlearn {command}", description=f"{description.capitalize()}.", allow_abbrev=False)


def check_output(command: str, options: argparse.Namespace) -> None:
    """Refuse an output that ``command`` cannot write, or that cannot be what its name says.

    Raises:
        ValueError: What is wrong with its name.
    """
    output = getattr(options, "output", None)
    if output is None:
        return
    check_path("output", output)
    if command == "export" and not (options.delta or options.lora):
        return  # it says itself what stands in its way, which may be an earlier export
    suffixes: Sequence[str] = ()
    if command == "generate":
        suffixes = [".png"]
    elif command == "export":
        suffixes = [".safetensors"]
    check_output_name(output, suffixes, may_be_folder=command != "generate")


def add_model_options(parser: Parser, default: str) -> None:
    """Add ``--model`` and ``--revision``; ``default`` says which model is taken without them."""
    parser.add_argument("--model", help=f"diffusers folder, emoji-sd (embedded), or hub id; default: {default}")
    parser.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
