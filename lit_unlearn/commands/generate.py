"""``lit-unlearn generate``: draw pictures of prompts and write them as one PNG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors
from lit_unlearn.system.json_files import read_json
from lit_unlearn.system.names import check_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from lit_unlearn.diffusion.pipeline import Pipeline

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
    made.add_argument("--seed", type=int, default=0, help="seed of the first picture of each prompt; default: 0")
    made.add_argument("--num", type=int, default=1, help="pictures of each prompt; default: 1")
    made.add_argument("--num_inference_steps", type=int, help="denoising steps; default: as in the run, or 15")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: as in the run, or 4")
    made.add_argument("--scale", type=int, help="enlargement; default: to at least 256 pixels")
    made.add_argument("--batch_size", type=int, default=8, help="pictures drawn at once; default: 8")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--offload", action="store_true", help="move parts to the GPU only while they are used")
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
        for field in ("num", "num_inference_steps", "scale", "batch_size"):
            value = getattr(options, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
    import torch
    from PIL import Image

    from lit_unlearn.diffusion.offload import Offload
    from lit_unlearn.edits.checkpoint import chosen_base, load_edited, read_edit, warn_unfinished
    from lit_unlearn.evaluation.grids import image_grid
    from lit_unlearn.system.devices import explaining_memory, find_device
    from lit_unlearn.system.pixels import save_png, to_pil

    with user_errors():
        device = find_device(options.device)
        edit = read_edit(options.ckpt_path) if options.ckpt_path is not None else None
        if edit is not None:
            warn_unfinished(options.ckpt_path)
        base = chosen_base(options.model, options.revision, edit, options.config_folder)
        hyper_parameters = edit.hyper_parameters if edit else {}
        steps = options.num_inference_steps or hyper_parameters.get("num_inference_steps", 15)
        base.check_steps(steps, "num_inference_steps")
    ways = [f"draw fewer at once (--batch_size, now {options.batch_size})"] if options.batch_size > 1 else []
    ways += (
        ["move parts there only while they are used (--offload)"]
        if device.type != "cpu" and not options.offload
        else []
    )
    ways += ["draw on the processor (--device cpu)"] if device.type != "cpu" else []
    with user_errors(), explaining_memory("generate", device, ways):
        pipeline = load_edited(base, edit, torch.device("cpu") if options.offload else device)
        if options.offload and device.type != "cpu":
            Offload(pipeline.parts, device)
    guidance_scale = options.guidance_scale
    if guidance_scale is None:
        guidance_scale = hyper_parameters.get("guidance_scale", 4.0)
    seeds = list(range(options.seed, options.seed + options.num))
    with plain_warnings(), explaining_memory("generate", device, ways):
        pictures = draw(pipeline, options.prompts, seeds, steps, guidance_scale, options.batch_size)
    if not pictures.isfinite().all():
        raise UserError(
            f"generate: pictures by {base.name} with guidance_scale={guidance_scale:g} and num_inference_steps={steps} "
            "are not finite, so nothing is written: the model, its scheduler's settings or the edit are broken."
        )
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
    print(f"{output}: {base.name}, {what}, {steps} steps, guidance {guidance_scale:g}, {which}")


def earlier_edit(place: Path | str) -> list[str]:
    """What a model written by ``export`` was edited to lack: its concepts, or its method; empty for other models.

    Args:
        place: Its folder, or its single file, whose header holds the provenance; or a hub id.
    """
    try:
        if Path(place).is_file():
            from lit_unlearn.edits.single_file import PROVENANCE, SingleFile

            metadata = SingleFile(place).metadata
            ours = {k.removeprefix(PROVENANCE): v for k, v in metadata.items() if k.startswith(PROVENANCE)}
            found = {name: json.loads(ours[name]) for name in ("edited_weights", "concepts", "method") if name in ours}
        else:
            found = read_json(Path(place, "provenance.json"), "export it again")
    except (OSError, ValueError):
        return []
    if not isinstance(found, dict) or "edited_weights" not in found:
        return []
    return [str(name) for name in found.get("concepts") or [found.get("method")]]


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> Tensor:
    """Draw each prompt with every seed and show a progress bar: pictures (prompts * seeds, 3, H, W) in [0, 1]."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    pictures: list[Tensor] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Into a file or a pipe, rich would write an empty line for the bar that it removes.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Drawing", total=num_inference_steps * len(batches))
        handle = pipeline.denoiser.register_forward_hook(lambda *_: progress.advance(task))
        try:
            for batch in batches:
                batch_prompts, batch_seeds = zip(*batch, strict=True)
                pictures.append(pipeline.draw(batch_prompts, batch_seeds, num_inference_steps, guidance_scale))
        finally:
            handle.remove()
    return torch.cat(pictures)
