"""Where a pipeline comes from: found, checked and loaded.

Data flow: a model name (a folder in the diffusers layout, the name of the embedded model, or a hub id) is resolved and
checked by ``check_model`` without loading weights; ``load_pipeline`` then builds the parts, frozen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.samplers import make_sampler
from lit_unlearn.diffusion.source import resolve_model, weight_files
from lit_unlearn.system.json_files import read_json

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import CLIPTokenizer

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


def check_model(model: str) -> dict[str, list[str]]:
    """Check a model folder without loading its weights.

    Args:
        model: As for ``resolve_model``. A hub id cannot be checked before it is downloaded: the answer is then empty.

    Returns:
        Names of the parameters of ``text_encoder``, ``unet`` and ``vae``, read from the headers of the weight files.

    Raises:
        ValueError: A part or a file is missing, a weight file is corrupt, or the pipeline is of another architecture.
    """
    path = resolve_model(model)
    return {} if isinstance(path, str) else check_folder(path, model)


def check_folder(path: Path, model: str) -> dict[str, list[str]]:
    """As ``check_model``, of the folder ``path`` that was given as ``model``."""
    for part in ("model_index.json", *PARTS):
        if not (path / part).exists():
            raise ValueError(f"model={model!r} lacks {part}: a folder in the diffusers layout has {', '.join(PARTS)}.")
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        encoder = index["text_encoder"][1]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"model={model!r}: {path / 'model_index.json'} names no text_encoder: copy it again."
        ) from error
    if encoder != "CLIPTextModel" or "text_encoder_2" in index:
        raise ValueError(
            f"model={model!r} has the text encoder {encoder!r}: only pipelines with a single CLIPTextModel "
            "(Stable Diffusion 1.x and 2.x) can be edited."
        )
    read_sampler(path, model)
    names: dict[str, list[str]] = {}
    for part in ("text_encoder", "unet", "vae"):
        weights = weight_files(path, part)
        if not weights:
            raise ValueError(f"model={model!r} has no *.safetensors in {part}/: convert it with save_pretrained first.")
        names[part] = []
        for file in weights:
            try:
                with safe_open(file, framework="pt") as tensors:
                    names[part] += [name.removeprefix("text_model.") for name in tensors.keys()]  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"model={model!r}: {file} is corrupt ({error}): copy it again.") from error
    return names


def read_sampler(path: Path, model: str) -> SchedulerMixin:
    """The sampler of the folder ``path`` that was given as ``model``.

    Raises:
        ValueError: It cannot be read, or used.
    """
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file, "a folder in the diffusers layout has it")
    if not isinstance(config, dict):
        raise ValueError(f"model={model!r}: {file} is not the configuration of a scheduler: copy it again.")
    return make_sampler(config, model)


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
        ValueError: As ``check_model``.
    """
    path = resolve_model(model)
    if isinstance(path, Path):
        check_folder(path, model)
    return load_parts(path, dtype, revision, device)


def load_tokenizer(path: Path | str, options: dict[str, Any] | None = None) -> CLIPTokenizer:
    """The tokenizer of a folder that was checked, or of a hub id."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **(options or {}))


def load_parts(
    path: Path | str, dtype: torch.dtype, revision: str | None = None, device: torch.device | None = None
) -> StableDiffusion:
    """As ``load_pipeline``, of a folder that was checked, or a hub id."""
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):  # transformers takes another default device for a device map, which needs accelerate
        return _load(path, dtype, revision, device)


def _load(path: Path | str, dtype: torch.dtype, revision: str | None, device: torch.device) -> StableDiffusion:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import is_accelerate_available
    from transformers import CLIPTextModel

    options: dict[str, Any] = {"revision": revision} if isinstance(path, str) else {}
    # Never the pickles that some models have beside them.
    weights = {**options, "dtype": dtype, "use_safetensors": True}
    # What diffusers would fall back to anyhow, with a page of advice.
    models = {**weights, "low_cpu_mem_usage": is_accelerate_available()}

    scheduler = _load_scheduler(path, options)  # first: one that cannot be used is refused before weights are read

    def load(kind: Any, part: str, options: dict[str, Any]) -> Any:
        return _load_part(kind, path, part, options).eval().requires_grad_(False).to(device)

    channels_last = {"memory_format": torch.channels_last}
    return StableDiffusion(
        tokenizer=load_tokenizer(path, options),
        text_encoder=load(CLIPTextModel, "text_encoder", weights),
        unet=load(UNet2DConditionModel, "unet", models).to(**channels_last),
        vae=load(AutoencoderKL, "vae", models).to(**channels_last),
        scheduler=scheduler,
    )


def _load_part(kind: Any, path: Path | str, part: str, options: dict[str, Any]) -> Any:
    """Load a part from a folder or the hub; from its half-precision files if there are no others."""
    if isinstance(path, Path):
        half = all(len(file.suffixes) > 1 for file in weight_files(path, part))
        return kind.from_pretrained(path, subfolder=part, variant="fp16" if half else None, **options)
    try:
        return kind.from_pretrained(path, subfolder=part, **options)
    except OSError as error:
        try:
            return kind.from_pretrained(path, subfolder=part, variant="fp16", **options)
        except OSError:
            raise error from None  # what is missing is something else


def _load_scheduler(path: Path | str, options: dict[str, Any]) -> SchedulerMixin:
    if isinstance(path, Path):
        return read_sampler(path, str(path))
    from diffusers import DDPMScheduler

    return make_sampler(DDPMScheduler.load_config(path, subfolder="scheduler", **options), path)
