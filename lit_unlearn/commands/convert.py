"""``lit-unlearn convert``: write a checkpoint that is a pickle as safetensors, without running code from it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.commands.parser import Parser, command_parser
from lit_unlearn.system.errors import user_errors

DESCRIPTION = "write a .ckpt as safetensors, running no code from it"


def parser() -> Parser:
    """Options of ``convert``."""
    made = command_parser("convert", DESCRIPTION)
    made.add_argument("checkpoint", metavar="CKPT", help="checkpoint of a model: .ckpt, .pt, .pth or .bin")
    made.add_argument("-o", "--output", required=True, metavar="FILE", help="file of safetensors to write")
    return made


def run(options: argparse.Namespace) -> None:
    """Write a checkpoint that is a pickle as safetensors.

    Raises:
        UserError: The checkpoint cannot be read without running code, or the output exists.
        OSError: The output cannot be written.
    """
    from lit_unlearn.edits.convert import convert

    with user_errors():
        converted = convert(Path(options.checkpoint), Path(options.output))
    print(f"{options.output}: {converted.tensors} tensors of {options.checkpoint}")
    if converted.left_out:
        print(f"left out, since they are no weights: {', '.join(converted.left_out)}")
