"""Where a pipeline comes from: found, checked and loaded.

Data flow: a model name (a folder in the diffusers layout, the name of the embedded model, or a hub id) is resolved by
``resolve_model``, or by ``hub.download``, to a folder, which ``check_folder`` checks without loading weights;
``load_parts`` then builds the parts, frozen.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_unlearn.diffusion.check import PARTS, check_parts, check_weights, load_scheduler, load_tokenizer
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.hub import cached_snapshot, download
from lit_unlearn.diffusion.source import resolve_model, weight_variant
from lit_unlearn.system.errors import plain_warnings

MENDED = {
    "scheduler": ("steps_offset", "clip_sample"),
    "unet": ("sample_size",),
}
"""What diffusers' pipeline changes in configurations of 2022 when it loads them."""


def check_model(model: str) -> dict[str, list[str]]:
    """Check a model folder without loading its weights.

    Args:
        model: As for ``resolve_model``. A hub id cannot be checked before it is downloaded: the answer is then empty.

    Returns:
        Names of the parameters of ``text_encoder``, ``unet`` and ``vae``, read from the headers of the weight files.

    Raises:
        ValueError: A part or a file is missing, a weight file is corrupt, the weights are not those of the model that
            its configuration describes, or the pipeline is of another architecture.
    """
    path = resolve_model(model)
    return {} if isinstance(path, str) else check_folder(path, model)


def check_folder(path: Path, model: str) -> dict[str, list[str]]:
    """As ``check_model``, of the folder ``path`` that was given as ``model``."""
    check_parts(path, model)
    return check_weights(path, model)


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a hub id, from the cache or downloaded; its parts are checked before its weights are downloaded.

    Raises:
        ValueError: As ``download`` and ``check_parts``.
    """
    return cached_snapshot(model, revision) or download(model, revision, lambda folder: check_parts(folder, model))


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device: torch.device | None = None,
) -> StableDiffusion:
    """Load the parts of ``model``, frozen and in evaluation mode.

    One after the other, each moved at once: the processor's memory holds the largest part, never all of them beside
    those on a GPU.

    Args:
        model: A diffusers folder, ``emoji-sd``, or a hub id (``CompVis/stable-diffusion-v1-4``).
        dtype: Type of the weights.
        revision: Branch, tag or commit of a hub id.
        device: Where the weights shall lie; PyTorch's default device if None, which Lightning sets while it has a
            method configure its model.

    Raises:
        ValueError: As ``check_model`` and ``load_parts``.
    """
    place = resolve_model(model)
    path = place if isinstance(place, Path) else fetch(place, revision)
    check_folder(path, model)
    return load_parts(path, dtype, device)


def load_parts(path: Path, dtype: torch.dtype, device: torch.device | None = None) -> StableDiffusion:
    """As ``load_pipeline``, of a folder that was checked.

    Configurations of 2022 are mended as ``StableDiffusionPipeline`` does, so that an export draws what was judged.

    Raises:
        BrokenWeightsError: A weight is not finite in ``dtype``.
    """
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):  # transformers takes another default device for a device map, which needs accelerate
        pipeline = _load(path, dtype, device)
    _mend(pipeline, path)
    return pipeline


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import is_accelerate_available
    from transformers import CLIPTextModel

    # Never the pickles that some models have beside them.
    weights: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    # What diffusers would fall back to anyhow, with a page of advice.
    models = {**weights, "low_cpu_mem_usage": is_accelerate_available()}

    def load(kind: Any, part: str, options: dict[str, Any]) -> Any:
        module = _load_part(kind, path, part, options).eval().requires_grad_(False).to(device)
        _check_finite(module, f"{path / part}", dtype)
        return module

    channels_last = {"memory_format": torch.channels_last}
    text_encoder = load(CLIPTextModel, "text_encoder", weights)
    return StableDiffusion(
        tokenizer=load_tokenizer(path, str(path), text_encoder.config),
        text_encoder=text_encoder,
        unet=load(UNet2DConditionModel, "unet", models).to(**channels_last),
        vae=load(AutoencoderKL, "vae", models).to(**channels_last),
        scheduler=load_scheduler(path, str(path)),
    )


def _load_part(kind: Any, path: Path, part: str, options: dict[str, Any]) -> Any:
    """Load a part from a folder, of the variant that its files have."""
    return kind.from_pretrained(path, subfolder=part, variant=weight_variant(path, part), **options)


class BrokenWeightsError(ValueError):
    """A weight of the base model is not finite."""


def _check_finite(module: nn.Module, place: str, dtype: torch.dtype) -> None:
    for name, value in module.named_parameters():
        if not value.isfinite().all():
            raise BrokenWeightsError(
                f"{place} has the weight {name!r}, which is not finite in {str(dtype).removeprefix('torch.')}: copy "
                "the part again; if the file has numbers too large for float16, choose float32 or bfloat16."
            )


def _mend(pipeline: StableDiffusion, path: Path) -> None:
    """Let diffusers change the configurations as it does whenever it loads the folder, and say what it changed."""
    given = {part: dict(getattr(pipeline, part).config) for part in MENDED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the files should be corrected: said below
        pipeline.to_diffusers()
    for part, fields in MENDED.items():
        for field in fields:
            before, after = given[part].get(field), getattr(pipeline, part).config.get(field)
            if before != after:
                with plain_warnings():
                    warnings.warn(
                        f"{path / part}: {field}={before} of 2022 is taken as {after}, as diffusers does on loading.",
                        stacklevel=3,
                    )


__all__ = ["PARTS", "BrokenWeightsError", "check_folder", "check_model", "fetch", "load_parts", "load_pipeline"]
