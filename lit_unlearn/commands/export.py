"""``lit-unlearn export``: write an edited pipeline as a folder or a single file, or its changed weights."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import plain_warnings, user_errors

if TYPE_CHECKING:
    from lit_unlearn.diffusion.base_model import BaseModel

DESCRIPTION = "write an edited pipeline for diffusers, or its changed weights"
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """Options of ``export``."""
    made = command_parser("export", DESCRIPTION)
    made.add_argument("--ckpt_path", required=True, help="a run's checkpoint, or a delta")
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    made.add_argument(
        "--delta",
        action="store_true",
        help="write the changed weights only: DIR/delta.safetensors, or DIR if it is such a file",
    )
    made.add_argument(
        "--lora",
        metavar="RANK",
        help="write LoRA weights of at most this rank, of the rank they need (auto), or without a loss (exact)",
    )
    made.add_argument(
        "--format",
        choices=("folder", "single"),
        default="folder",
        help="form of a whole model: diffusers folder, or a copy of --single_file with the edit; default: folder",
    )
    made.add_argument(
        "--single_file",
        metavar="FILE",
        help="with --format single: the model's checkpoint in the layout of the original code (.safetensors); default: "
        "the edited model, if it was one",
    )
    made.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as in the run")
    made.add_argument(
        "--names",
        choices=("2022",),
        help="names of a folder's weights for older tools: with text_model. before the text encoder's",
    )
    add_model_options(made, "the one that was edited")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return made


def run(options: argparse.Namespace) -> None:
    """Write an edited pipeline as a diffusers folder or a single file, or its changed weights as safetensors.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
        OSError: The output cannot be written.
    """
    with user_errors():  # mistakes are told before PyTorch is imported, which takes seconds
        if options.names and (options.lora or options.delta):
            raise ValueError(
                "--names is for folders: LoRA weights have the names of kohya's scripts, which old and new tools read, "
                "and a delta has lit-unlearn's own."
            )
        if options.delta and options.lora:
            raise ValueError("--delta cannot be combined with --lora: a delta is exact, LoRA weights have a low rank.")
        check_single(options)
    import torch

    from lit_unlearn.edits.card import left_out
    from lit_unlearn.edits.checkpoint import chosen_base, read_edit, warn_unfinished
    from lit_unlearn.edits.export import (
        export_delta,
        export_lora,
        export_pipeline,
        export_single,
        output_path,
        provenance,
    )
    from lit_unlearn.edits.lora import FILE_NAME, notable_loss, parse_rank
    from lit_unlearn.edits.single_file import SingleFile

    dtype = getattr(torch, options.dtype) if options.dtype else None
    kept = report = written = source = None
    with user_errors(), plain_warnings():
        rank = parse_rank(options.lora) if options.lora else None
        if options.single_file:
            source = SingleFile(options.single_file)
        edit = base = None
        if options.format == "single" and source is None:  # the model that was edited, if it is a single file
            edit = read_edit(options.ckpt_path)
            base = chosen_base(options.model, options.revision, edit, options.config_folder)
            source = SingleFile(single_file_of(base))
        file_name = "delta.safetensors" if options.delta else FILE_NAME if options.lora else None
        file_name = source.path.name if source is not None else file_name
        output = output_path(Path(options.output), file_name, options.overwrite)
        edit = edit or read_edit(options.ckpt_path)
        if source is not None:
            for name in edit.weights:
                source.dtype(name)  # a file without a place for it is refused before the model is read
        warn_unfinished(options.ckpt_path)
        base = base or chosen_base(options.model, options.revision, edit, options.config_folder)
        if options.delta:
            export_delta(edit, provenance(edit, base), output, dtype)
        elif options.lora:
            report = export_lora(edit, provenance(edit, base), base, output, rank, dtype)
            if loss := notable_loss(report):
                warnings.warn(loss, stacklevel=1)
        elif source is not None:
            written = export_single(edit, provenance(edit, base), base, source, output, options.overwrite)
        else:
            kept = export_pipeline(edit, base, output, dtype, options.names == "2022")
    print(f"{output}: {base.name} without {', '.join(edit.concepts) or 'what it has unlearned'}")
    if kept is not None:
        for line in left_out(kept.left_out):
            print(f"not taken over from the base: {line}")
    for line in written.lines() if written is not None else ():
        print(line)
    if report is not None:
        print(f"rank {report['rank']}; part of each layer's change that is missing:")
        for name, residual in report["residual"].items():
            print(f"  {name:60} {residual:.2e}")


def single_file_of(base: BaseModel) -> Path:
    """The single file that the edited model is.

    Raises:
        ValueError: It is a folder or a model of the hub.
    """
    if base.single_file is None:
        raise ValueError(
            f"--format single needs --single_file FILE: model={base.name!r} is no single file, and the edit is written "
            "into a copy of one."
        )
    return base.single_file


def check_single(options: argparse.Namespace) -> None:
    """Refuse options that do not go together with a single file.

    Raises:
        ValueError: Which ones, and what to do.
    """
    if options.single_file and options.format != "single":
        raise ValueError("--single_file FILE needs --format single: the edit is written into a copy of that file.")
    if options.format != "single":
        return
    for option in ("delta", "lora", "names"):
        if getattr(options, option):
            raise ValueError(f"--format single cannot be combined with --{option}: choose one form.")
    if options.dtype:
        raise ValueError("--dtype cannot be combined with --format single: the copy has the types of the file.")
