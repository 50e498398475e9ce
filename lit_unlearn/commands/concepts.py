"""``lit-unlearn concepts``: write a concept set from names, check one, or show one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.commands.parser import Once, Parser, command_parser
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.system.errors import plain_warnings, user_errors

if TYPE_CHECKING:
    from lit_unlearn.data.concepts import ConceptSet
    from lit_unlearn.data.templates import Wish

DESCRIPTION = "write, check or show a concept set"


def parser() -> Parser:
    """Options of ``concepts``."""
    made = command_parser("concepts", DESCRIPTION)
    actions = made.add_subparsers(dest="action", required=True, metavar="new|check|show", parser_class=Parser)
    new = actions.add_parser("new", help="write a set of names", allow_abbrev=False)
    new.add_argument("concept", nargs="?", metavar="NAME", help="the concept, as people write it")
    new.add_argument("--to", action=Once, help="what to draw in its place")
    new.add_argument("--kind", help=f"{', '.join(KINDS)}; default: object")
    new.add_argument("--also", action="append", default=[], metavar="NAMES", help="further words for it, by commas")
    new.add_argument("--table", metavar="FILE.csv", help="concepts instead of NAME: columns concept, to, kind, names")
    new.add_argument("--protect", action="append", default=[], metavar="NAMES", help="neighbours to keep, by commas")
    new.add_argument("--retain", metavar="FILE", help="prompts to keep: .csv with a column prompt, or .txt")
    new.add_argument("--prompts", metavar="FILE", help="prompts of NAME to judge too: .csv or .txt")
    new.add_argument("--question", help="question to the judge about NAME")
    new.add_argument("--output", "-o", required=True, metavar="FILE.yaml", help="set to write")
    new.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    for action, what in (("check", "check a set completely"), ("show", "show concepts and prompts of a set")):
        one = actions.add_parser(action, help=what, allow_abbrev=False)
        one.add_argument("set", metavar="SET", help="a .yaml file, or the name of a set of the package")
        if action == "show":
            one.add_argument(
                "names", nargs="*", metavar="NAME", help="concepts to show in full; default: a list of all"
            )
    return made


def run(options: argparse.Namespace) -> None:
    """Write, check or show a concept set.

    Raises:
        UserError: An option or the set is wrong.
        OSError: The set cannot be written.
    """
    from lit_unlearn.data.concepts import load_concept_set
    from lit_unlearn.data.templates import summary

    with user_errors(), plain_warnings():
        if options.action == "new":
            made = new_set(options)
            print(f"{options.output}: {', '.join(made.concepts)}; {len(made.retain)} further prompts to retain")
            return
        found = load_concept_set(options.set)
        if options.action == "check":
            counts = found.counts
            print(
                f"{found.path}: the set {found.name} is valid: {len(found.concepts)} concepts, each with {counts.edit} "
                f"edit, {counts.direct} direct and {counts.indirect} indirect prompts."
            )
        elif options.names:
            print("\n\n".join("\n".join(summary(found.get(name))) for name in options.names))
        else:
            width = max(map(len, found.concepts))
            for concept in found.concepts.values():
                print(f"{concept.name:{width}}  {concept.kind:9}  -> {concept.target}")


def new_set(options: argparse.Namespace) -> ConceptSet:
    """Write the set that the options ask for.

    Raises:
        ValueError: An option is wrong, or the output exists.
        OSError: The set cannot be written.
    """
    from lit_unlearn.data.concepts import check_set_output
    from lit_unlearn.data.tables import read_prompts
    from lit_unlearn.data.templates import set_of, split_names

    output = Path(options.output)
    check_set_output(output, options.overwrite)
    retain = [row.prompt for row in read_prompts(options.retain, "retain")] if options.retain else []
    made = set_of(_wishes(options), output, output.stem, split_names(options.protect), retain)
    made.save(output, options.overwrite)
    return made


def _wishes(options: argparse.Namespace) -> list[Wish]:
    from lit_unlearn.data.tables import read_prompts, read_wishes
    from lit_unlearn.data.templates import Wish, split_names

    if (options.concept is None) == (options.table is None):
        raise ValueError("concepts new takes NAME with --to, or --table FILE.csv: give one of them.")
    if options.table is not None:
        for option in ("to", "also", "prompts", "question"):
            if getattr(options, option):
                raise ValueError(f"{option} is for one NAME: a table has its own columns, so leave it out.")
        return read_wishes(options.table, options.kind)
    if options.to is None:
        raise ValueError('to is missing: say what to draw in its place, such as --to "a cartoon mouse".')
    prompts = tuple(row.prompt for row in read_prompts(options.prompts)) if options.prompts else ()
    also = tuple(split_names(options.also, "also"))
    return [Wish(options.concept, options.to, options.kind or "object", also, options.question, prompts)]
