"""``lit-unlearn undo``: an edit on top of others, without one of them, as a delta."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors
from lit_unlearn.system.run_file import check_checkpoint, checkpoint_of

DESCRIPTION = "take one edit out of several that lie on top of each other"


def parser() -> Parser:
    """Options of ``undo``."""
    made = command_parser("undo", DESCRIPTION)
    made.add_argument("--ckpt_path", required=True, help="a run of fit --base_edit, its checkpoint, or a delta of it")
    made.add_argument(
        "--edit", metavar="NUMBER|CONCEPT", help="the edit to take out: its place, from 1, or a concept that it edited"
    )
    made.add_argument("-o", "--output", metavar="FILE", help="delta to write, or a folder for delta.safetensors")
    add_model_options(made, "the one that was edited")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return made


def run(options: argparse.Namespace) -> None:
    """Write a delta of the edits without one of them; without ``--edit``, list them.

    Raises:
        UserError: An option, the checkpoint or the model is wrong, or the edit cannot be taken out.
        OSError: The output cannot be written.
    """
    with user_errors():
        check_checkpoint(options.ckpt_path)
    from lit_unlearn.edits.chain import links_of
    from lit_unlearn.edits.checkpoint import read_edit
    from lit_unlearn.edits.undo import find_link, write_without

    path = checkpoint_of(Path(options.ckpt_path).expanduser())
    with user_errors(), plain_warnings():
        edit = read_edit(path)
        links = links_of(edit)
        if options.edit is None and options.output is not None:
            raise UserError(f"undo: name the edit to take out with --edit, for output={options.output}.")
        if options.edit is None:
            print("\n".join(f"{number}  {link.title()}" for number, link in enumerate(links, 1)))
            print("Name the one to take out with --edit, and the delta to write with --output.")
            return
        number = find_link(links, options.edit)
        if options.output is None:
            raise UserError("undo: name the delta to write with --output.")
        written, left = write_without(
            edit,
            number,
            options.output,
            model=options.model,
            revision=options.revision,
            config_folder=options.config_folder,
            overwrite=options.overwrite,
        )
    print(f"{written}: {', '.join(link.title() for link in links_of(left))}, without {links[number].title()}")
