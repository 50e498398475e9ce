"""``lit-unlearn export``: write an edited pipeline as a folder or a single file, or its changed weights."""

from __future__ import annotations

import argparse

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.diffusion.lora_names import NAMINGS
from lit_unlearn.edits.dtypes import DTYPES
from lit_unlearn.edits.form_checks import Form, check_form, check_push
from lit_unlearn.system.errors import plain_warnings, user_errors

DESCRIPTION = "write an edited pipeline for diffusers, or its changed weights"


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
        "--lora_names",
        choices=NAMINGS,
        help="with --lora: kohya's names, which diffusers, webui, Forge and ComfyUI read, or diffusers' own; default: "
        "kohya",
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
    made.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub too, with a card")
    made.add_argument("--private", action="store_true", help="with --push_to_hub: make a private repository")
    made.add_argument("--license", metavar="ID", help="with --push_to_hub: licence of the card, e.g. openrail")
    add_model_options(made, "the one that was edited")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return made


def run(options: argparse.Namespace) -> None:
    """Write an edited pipeline as a diffusers folder or a single file, or its changed weights as safetensors.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
        OSError: The output cannot be written.
    """
    with user_errors():
        check_forms(options)
        form: Form = "delta" if options.delta else "lora" if options.lora else options.format
        check_form(form, options.lora, options.dtype, options.names, options.single_file, options.lora_names)
        check_push(options.push_to_hub, options.private, options.license)
    from lit_unlearn.edits.forms import export_edit  # PyTorch, which takes seconds: mistakes are told before

    hub = None
    if options.push_to_hub:
        from lit_unlearn.edits.publish import checked_hub

        hub = checked_hub(options.push_to_hub, options.private, options.license, options.overwrite)
    made = export_edit(
        options.ckpt_path,
        options.output,
        form,
        rank=options.lora,
        lora_names=options.lora_names,
        dtype=options.dtype,
        names=options.names,
        single_file=options.single_file,
        model=options.model,
        revision=options.revision,
        config_folder=options.config_folder,
        overwrite=options.overwrite,
    )
    print("\n".join(made.lines()))
    if hub is not None:
        with user_errors(), plain_warnings():
            print(f"{hub.upload(made, form, options.ckpt_path)}: uploaded")


def check_forms(options: argparse.Namespace) -> None:
    """Refuse options that ask for more than one form.

    Raises:
        ValueError: Which ones, and what to do.
    """
    if options.delta and options.lora:
        raise ValueError("--delta cannot be combined with --lora: a delta is exact, LoRA weights have a low rank.")
    for option in ("delta", "lora"):
        if options.format == "single" and getattr(options, option):
            raise ValueError(f"--format single cannot be combined with --{option}: choose one form.")
