"""Parsers of commands, which leave it to ``main`` to report errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_unlearn.system.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves it to ``main`` to report errors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError``."""
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}.")


def command_parser(command: str, description: str) -> Parser:
    """An empty parser of ``lit-unlearn COMMAND``."""
    return Parser(prog=f"lit-unlearn {command}", description=f"{description.capitalize()}.", allow_abbrev=False)


def add_model_options(parser: Parser, default: str) -> None:
    """Add ``--model`` and ``--revision``; ``default`` says which model is taken without them."""
    parser.add_argument("--model", help=f"diffusers folder, emoji-sd (embedded), or hub id; default: {default}")
    parser.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
