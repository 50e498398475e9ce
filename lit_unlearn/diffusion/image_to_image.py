"""Pictures from pictures: noised and denoised again, all of them or a part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.pipeline import Pipeline


@torch.no_grad()
def image_to_image(
    pipeline: Pipeline,
    condition: Condition,
    latents: Tensor,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    strength: float,
    unconditional: Condition | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Latents (B, C, H, W) of pictures that are noised and denoised again (SDEdit, Meng et al., 2022).

    They equal those of ``StableDiffusionImg2ImgPipeline``; with ``mask``, those of
    ``StableDiffusionInpaintPipeline`` with a model without further channels.

    Args:
        pipeline: The model.
        condition: Condition of B prompts.
        latents: Latents of the pictures, (B, C, H, W).
        seeds: Seed of each picture.
        num_inference_steps: Steps of the sampler from noise.
        guidance_scale: Strength of the guidance; 1 means no guidance.
        strength: Share of the steps that are taken, in (0, 1].
        unconditional: As for ``sample``.
        mask: 1 where the picture is drawn anew and 0 where it stays, broadcast to (B, C, H, W); None for all of it.
            What stays is put back after each step, with the noise of the next (blending, as in RePaint, Lugmayr et
            al., 2022). With the whole ``strength`` the chain then begins at noise alone.

    Raises:
        ValueError: ``strength`` is less than one step.
    """
    noise, generators = pipeline.start_chains(seeds)
    latents, noise = latents.to(pipeline.device, pipeline.dtype), noise.to(pipeline.device, pipeline.dtype)
    start: int | None = pipeline.noise.start_step(num_inference_steps, strength)
    if start == pipeline.noise.start_step(num_inference_steps, 0):
        raise ValueError(f"strength={strength} is less than one of {num_inference_steps} steps: give more of one.")
    change = None
    if mask is not None:
        kept = mask.to(latents)

        def change(number: int, drawn: Tensor) -> Tensor:
            original = pipeline.noise.at_step(latents, noise, num_inference_steps, number + 1)
            return (1 - kept) * original + kept * drawn

    if mask is not None and strength == 1:
        start, begin = None, noise
    else:
        assert start is not None
        begin = pipeline.noise.at_step(latents, noise, num_inference_steps, start)
    options = {"generators": generators, "start": start, "change": change}
    return pipeline.sample(condition, begin, num_inference_steps, guidance_scale, unconditional, **options)  # type: ignore[arg-type]
