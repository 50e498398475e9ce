"""Parsers of commands; they raise errors, and ``main`` reports them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lit_unlearn.system.errors import UserError, closest
from lit_unlearn.system.names import check_output_name, check_path


class Parser(argparse.ArgumentParser):
    """An argument parser that raises errors, so that ``main`` reports them."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError``."""
        known = ""
        if message.startswith("unrecognized arguments: -"):
            given = message.split()[2].partition("=")[0]
            known = closest(given, [name for action in self._actions for name in action.option_strings])
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}{known}.")


class Once(argparse.Action):
    """Stores the value of an option that takes one value, and refuses to be given twice."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store ``values``."""
        given: set[str] = getattr(namespace, "given_once", set())
        if self.dest in given:
            parser.error(f"{option} is given twice and takes one value")
        namespace.given_once = {*given, self.dest}
        setattr(namespace, self.dest, values)


class Listing(argparse.Action):
    """An option that prints a list and ends the program.

    Args:
        listing: Returns the text; modules that take seconds to import are imported in it.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, listing: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self.listing = listing

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        """Print the list."""
        parser._print_message(f"{self.listing()}\n", sys.stdout)  # as for help: a closed pipe is not an error
        parser.exit()


def command_parser(command: str, description: str, kind: type[Parser] = Parser) -> Parser:
    """An empty parser of ``lit-unlearn COMMAND``."""
    return kind(prog=f"lit-unlearn {command}", description=f"{description.capitalize()}.", allow_abbrev=False)


def check_output(command: str, options: argparse.Namespace) -> None:
    """Refuse an output that ``command`` cannot write, or whose name does not fit the type of the file.

    Raises:
        ValueError: The name is wrong; the message says why.
    """
    output = getattr(options, "output", None)
    if output is None:
        return
    check_path("output", output)
    single = command == "export" and options.format == "single"
    if command == "erase" or (command == "export" and not (options.delta or options.lora or single)):
        return  # it says itself what stands in its way, which may be an earlier export
    suffixes: Sequence[str] = ()
    if command in (endings := {"generate": ".png", "compare": ".html", "concepts": ".yaml"}):
        suffixes = [endings[command]]
    elif command in ("export", "convert", "undo"):
        suffixes = [".safetensors"]
    check_output_name(output, suffixes, may_be_folder=command not in {*endings, "convert"})


def add_model_options(parser: Parser, default: str) -> None:
    """Add ``--model`` and what belongs to it; ``default`` describes the model that is used without them."""
    parser.add_argument(
        "--model",
        help=f"diffusers folder, .safetensors file, emoji-sd (embedded), or hub id; default: {default}",
    )
    parser.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
    add_config_folder(parser)


def add_clip_skip(parser: Parser, default: str) -> None:
    """Add ``--clip_skip``; ``default`` describes what is taken without it."""
    parser.add_argument(
        "--clip_skip",
        type=int,
        metavar="K",
        help="read prompts K layers of the text encoder earlier, as diffusers' clip_skip (K is the Clip skip of web "
        f"UIs less one); default: {default}",
    )


def add_config_folder(parser: Parser) -> None:
    """Add ``--config_folder``."""
    parser.add_argument(
        "--config_folder",
        metavar="FOLDER",
        help="diffusers folder with what a single file does not hold: tokenizers, and parts that are missing in it",
    )
