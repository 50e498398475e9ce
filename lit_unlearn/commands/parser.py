"""Parsers of commands, which leave it to ``main`` to report errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lit_unlearn.system.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves it to ``main`` to report errors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError``."""
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}.")


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


def add_model_options(parser: Parser, default: str) -> None:
    """Add ``--model`` and ``--revision``; ``default`` says which model is taken without them."""
    parser.add_argument("--model", help=f"diffusers folder, emoji-sd (embedded), or hub id; default: {default}")
    parser.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
