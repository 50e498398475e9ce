"""Draws pictures of prompts with an edit, or without one; ``generate`` and ``lit_unlearn.draw`` call this.

Data flow: everything is checked; the base model is found and loaded, and the edit is applied; the prompts are drawn in
batches, each from its own seeds, with a bar; pictures that are not finite are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.compiled import check_compiler, compile_drawing, is_compiled
from lit_unlearn.diffusion.offload import Offload
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.checkpoint import Edit, load_edited, warn_unfinished
from lit_unlearn.system.devices import explaining_memory, find_device
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors
from lit_unlearn.system.names import check_numbers, check_prompts
from lit_unlearn.system.progress import progress

STEPS, GUIDANCE = 15, 4.0
"""Denoising steps and guidance of pictures without an edit."""


@dataclass(frozen=True)
class Drawn:
    """Pictures, and what they were drawn with.

    Attributes:
        pictures: (prompts * num, 3, H, W), float32 in [0, 1]: all seeds of the first prompt, then of the next.
        base: The model; None if a loaded pipeline was given.
        seeds: Seeds of the pictures of each prompt.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of classifier-free guidance.
    """

    pictures: Tensor
    base: BaseModel | None
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float


def draw_edit(
    edit: Edit | Pipeline | None,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    model: str | None = None,
    revision: str | None = None,
    config_folder: str | None = None,
    clip_skip: int | None = None,
    device: str | None = None,
    offload: bool = False,
    torch_compile: bool = False,
) -> Drawn:
    """Draw prompts.

    Args:
        edit: Edit to apply to its base model, a pipeline that is loaded, or None for the base model alone.
        prompts: The prompts, at least one.
        seed: Seed of the first picture of each prompt.
        num: Pictures of each prompt.
        num_inference_steps: Denoising steps; None for the edit's own, or 15.
        guidance_scale: Strength of classifier-free guidance; None for the edit's own, or 4.
        batch_size: Pictures drawn at once.
        model: The base model; None for the one that was edited, or the embedded one.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: Folder with what a single file does not hold, as for ``BaseModel.find``.
        clip_skip: Layers that prompts are read earlier; None for the edit's own, or none.
        device: The device; None takes a GPU if there is one.
        offload: Move parts to the GPU only while they are used.
        torch_compile: Draw with kernels that ``torch.compile`` makes.

    Raises:
        UserError: An argument is wrong, the edit does not fit the model, memory ran out, or pictures are not finite.
    """
    seeds = list(range(seed, seed + num))
    base, loaded = None, edit if isinstance(edit, Pipeline) else None
    of_edit = edit.hyper_parameters if isinstance(edit, Edit) else {}
    with user_errors():
        check_prompts(prompts)
        check_numbers(num=num, num_inference_steps=num_inference_steps, batch_size=batch_size)
        steps = int(num_inference_steps or of_edit.get("num_inference_steps", STEPS))
        if loaded is not None:
            place = loaded.device
            loaded.check_steps(steps, "num_inference_steps")
        else:
            assert not isinstance(edit, Pipeline)
            place = find_device(device)
            if edit is not None:
                warn_unfinished(edit.path)
            base = chosen_base(model, revision, edit, config_folder, clip_skip)
            base.check_steps(steps, "num_inference_steps")
        if torch_compile:
            check_compiler(place, "torch_compile")
    guidance = of_edit.get("guidance_scale", GUIDANCE) if guidance_scale is None else guidance_scale
    with user_errors(), explaining_memory("generate", place, _ways(batch_size, place, offload)):
        if loaded is None:
            assert base is not None and not isinstance(edit, Pipeline)
            loaded = load_edited(base, edit, torch.device("cpu") if offload else place)
            if offload and place.type != "cpu":
                Offload(loaded.parts, place)
        if torch_compile:
            compile_drawing(loaded)
    with plain_warnings(), explaining_memory("generate", place, _ways(batch_size, place, offload)):
        pictures = draw_all(loaded, prompts, seeds, steps, guidance, batch_size)
    if not pictures.isfinite().all():
        of = f" by {base.name}" if base is not None else ""
        raise UserError(
            f"generate: pictures{of} with guidance_scale={guidance:g} and num_inference_steps={steps} are not finite, "
            "so nothing is written: the model, its scheduler's settings or the edit are broken."
        )
    return Drawn(pictures, base, seeds, steps, float(guidance))


def _ways(batch_size: int, device: torch.device, offload: bool) -> list[str]:
    """How to use less memory."""
    ways = [f"draw fewer at once (--batch_size, now {batch_size})"] if batch_size > 1 else []
    if device.type != "cpu":
        ways += [] if offload else ["move parts there only while they are used (--offload)"]
        ways.append("draw on the processor (--device cpu)")
    return ways


def draw_all(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> Tensor:
    """Draw each prompt with every seed and show a progress bar: pictures (prompts * seeds, 3, H, W) in [0, 1]."""
    wanted_prompts = [prompt for prompt in prompts for _ in seeds]
    wanted_seeds = list(seeds) * len(prompts)
    label = "Compiling, then drawing" if is_compiled(pipeline.denoiser) else "Drawing"
    with progress(label, num_inference_steps * -(-len(wanted_prompts) // batch_size)) as advance:
        handle = pipeline.denoiser.register_forward_hook(lambda *_: advance())
        try:
            return pipeline.draw(wanted_prompts, wanted_seeds, num_inference_steps, guidance_scale, batch_size)
        finally:
            handle.remove()
