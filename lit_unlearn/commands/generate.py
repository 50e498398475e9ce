"""``lit-unlearn generate``: draw pictures of prompts and write them as one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.commands.parser import Parser, add_clip_skip, add_model_options, command_parser
from lit_unlearn.system.errors import user_errors
from lit_unlearn.system.names import check_numbers, check_prompts

DESCRIPTION = "draw pictures of prompts, with or without an edit"
MIN_SIDE = 256
"""Smaller pictures are enlarged until their shorter side has at least this many pixels."""


def parser() -> Parser:
    """Options of ``generate``."""
    made = command_parser("generate", DESCRIPTION)
    made.add_argument("prompts", nargs="+", metavar="PROMPT", help="one prompt for a picture, several for a grid")
    made.add_argument("-o", "--output", required=True, metavar="FILE.png", help="picture to write")
    made.add_argument("--ckpt_path", help="edit to apply: a run's checkpoint or a delta; default: none")
    add_model_options(made, "the one that was edited, or emoji-sd")
    add_clip_skip(made, "as in the run, or none")
    made.add_argument("--seed", type=int, default=0, help="seed of the first picture of each prompt; default: 0")
    made.add_argument("--num", type=int, default=1, help="pictures of each prompt; default: 1")
    made.add_argument("--num_inference_steps", type=int, help="denoising steps; default: as in the run, or 15")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: as in the run, or 4")
    made.add_argument("--scale", type=int, help="enlargement; default: to at least 256 pixels")
    made.add_argument("--batch_size", type=int, default=8, help="pictures drawn at once; default: 8")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--offload", action="store_true", help="move parts to the GPU only while they are used")
    what = "draw with kernels that torch.compile makes: for many pictures, since the first take a minute longer"
    made.add_argument("--torch_compile", action="store_true", help=what)
    made.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return made


def run(options: argparse.Namespace) -> None:
    """Draw pictures of prompts and write them as one PNG.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
    """
    output = Path(options.output)
    with user_errors():
        check_prompts(options.prompts)
        if output.exists() and not options.overwrite:
            raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
        check_numbers(
            num=options.num,
            num_inference_steps=options.num_inference_steps,
            scale=options.scale,
            batch_size=options.batch_size,
        )
    from PIL import Image

    from lit_unlearn.edits.checkpoint import read_edit
    from lit_unlearn.edits.drawing import draw_edit
    from lit_unlearn.evaluation.grids import image_grid
    from lit_unlearn.system.pixels import save_png, to_pil

    with user_errors():
        edit = read_edit(options.ckpt_path) if options.ckpt_path is not None else None
    drawn = draw_edit(
        edit,
        options.prompts,
        seed=options.seed,
        num=options.num,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
        model=options.model,
        revision=options.revision,
        config_folder=options.config_folder,
        clip_skip=options.clip_skip,
        device=options.device,
        offload=options.offload,
        torch_compile=options.torch_compile,
    )
    pictures, seeds, base = drawn.pictures, drawn.seeds, drawn.base
    assert base is not None
    scale = options.scale or -(-MIN_SIDE // min(pictures.shape[-2:]))
    if len(pictures) == 1:
        image = to_pil(pictures[0])
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    else:
        rows = list(pictures.split(len(seeds)))
        image = image_grid(rows, options.prompts, [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else (), scale)
    save_png(output, image)
    done = [*earlier_edit(base.place), *((edit.concepts or [edit.method]) if edit else [])]
    what = f"edited ({', '.join(done)})" if done else "not edited"
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    how = f"{drawn.num_inference_steps} steps, guidance {drawn.guidance_scale:g}"
    how += "" if base.clip_skip is None else f", clip_skip {base.clip_skip}"
    print(f"{output}: {base.name}, {what}, {how}, {which}")


def earlier_edit(place: Path | str) -> list[str]:
    """What a model written by ``export`` was edited to lack: its concepts, or its method; empty for other models.

    Args:
        place: Its folder, or its single file, whose header holds the provenance; or a hub id.
    """
    from lit_unlearn.diffusion.provenance import provenance_of

    found = provenance_of(place)
    return [str(name) for name in found.get("concepts") or [found.get("method")]] if found else []
