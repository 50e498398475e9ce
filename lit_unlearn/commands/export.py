"""``lit-unlearn export``: write an edited pipeline as a diffusers folder, or its changed weights as safetensors."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import plain_warnings, user_errors

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
        "--lora", metavar="RANK", help="write LoRA weights of at most this rank, or of the rank they need (auto)"
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
    """Write an edited pipeline as a diffusers folder, or its changed weights as safetensors.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
        OSError: The output cannot be written.
    """
    import torch

    from lit_unlearn.edits.checkpoint import chosen_base, read_edit, warn_unfinished
    from lit_unlearn.edits.export import export_delta, export_lora, export_pipeline, left_out, output_path, provenance
    from lit_unlearn.edits.lora import FILE_NAME, notable_loss, parse_rank

    dtype = getattr(torch, options.dtype) if options.dtype else None
    kept = report = None
    with user_errors(), plain_warnings():
        rank = parse_rank(options.lora) if options.lora else None
        if options.names and (options.lora or options.delta):
            raise ValueError(
                "--names is for folders: LoRA weights have the names of kohya's scripts, which old and new tools read, "
                "and a delta has lit-unlearn's own."
            )
        if options.delta and options.lora:
            raise ValueError("--delta cannot be combined with --lora: a delta is exact, LoRA weights have a low rank.")
        file_name = "delta.safetensors" if options.delta else FILE_NAME if options.lora else None
        output = output_path(Path(options.output), file_name, options.overwrite)
        edit = read_edit(options.ckpt_path)
        warn_unfinished(options.ckpt_path)
        base = chosen_base(options.model, options.revision, edit)
        if options.delta:
            export_delta(edit, provenance(edit, base), output, dtype)
        elif options.lora:
            report = export_lora(edit, provenance(edit, base), base, output, rank, dtype)
            if loss := notable_loss(report):
                warnings.warn(loss, stacklevel=1)
        else:
            kept = export_pipeline(edit, base, output, dtype, options.names == "2022")
    print(f"{output}: {base.name} without {', '.join(edit.concepts) or 'what it has unlearned'}")
    if kept is not None:
        for line in left_out(kept.left_out):
            print(f"not taken over from the base: {line}")
    if report is not None:
        print(f"rank {report['rank']}; part of each layer's change that is missing:")
        for name, residual in report["residual"].items():
            print(f"  {name:60} {residual:.2e}")
