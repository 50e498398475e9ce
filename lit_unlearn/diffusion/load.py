"""Finds, checks and loads a pipeline.

Data flow: a model name (a folder in the diffusers layout, a single file, the name of the embedded model, or a hub id)
is resolved by ``resolve_model``, ``local_folder``, or ``hub.download`` to a folder; ``check_folder`` checks it without
loading weights; ``load_parts`` then loads the parts and freezes them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_unlearn.diffusion.check import (
    check_parts,
    check_weights,
    declared_parts,
    family_in,
    load_scheduler,
    load_tokenizer,
)
from lit_unlearn.diffusion.hub import cached_snapshot, download
from lit_unlearn.diffusion.parts import KINDS, model_class
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.quiet import quiet_libraries
from lit_unlearn.diffusion.single_file.folder import local_folder
from lit_unlearn.diffusion.source import read_config, resolve_model, weight_variant, weights_folder
from lit_unlearn.diffusion.stored import stored_weights
from lit_unlearn.system.collector import collect_as_usual
from lit_unlearn.system.errors import plain_warnings


def check_model(model: str) -> dict[str, list[str]]:
    """Check a model folder without loading its weights.

    Args:
        model: As for ``resolve_model``.

    Returns:
        Names of the parameters of each part that has some, such as ``unet``, from the headers of the weight files.
        Empty for a hub id, which cannot be checked before it is downloaded.

    Raises:
        ValueError: A part or a file is missing, a weight file is corrupt, the weights do not fit the configuration, or
            the pipeline is of no known family.
    """
    path = resolve_model(model, single_file=True)
    return {} if isinstance(path, str) else check_folder(local_folder(path, None, model), model)


def check_folder(path: Path, model: str) -> dict[str, list[str]]:
    """As ``check_model``, for the folder ``path`` that the user gave as ``model``."""
    check_parts(path, model)
    return check_weights(path, model)


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a hub id, from the cache or downloaded; the parts are checked before the weights are downloaded.

    Raises:
        ValueError: As ``download`` and ``check_parts``.
    """
    return cached_snapshot(model, revision) or download(model, revision, lambda folder: check_parts(folder, model))


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device: torch.device | None = None,
) -> Pipeline:
    """Load the parts of ``model``, frozen and in evaluation mode.

    Each part is moved to the device before the next one is loaded, so that CPU memory is needed only for the largest
    part.

    Args:
        model: A diffusers folder, ``emoji-sd``, or a hub id (``CompVis/stable-diffusion-v1-4``).
        dtype: Type of the weights.
        revision: Branch, tag or commit of a hub id.
        device: Device of the weights; None takes PyTorch's default device, which Lightning sets while a method
            configures its model.

    Raises:
        ValueError: As ``check_model`` and ``load_parts``.
    """
    place = resolve_model(model, single_file=True)
    path = local_folder(place, None, model) if isinstance(place, Path) else fetch(place, revision)
    check_folder(path, model)
    return load_parts(path, dtype, device)


def load_parts(path: Path, dtype: torch.dtype, device: torch.device | None = None) -> Pipeline:
    """As ``load_pipeline``, for a folder that has been checked.

    Configurations of 2022 are corrected as in ``StableDiffusionPipeline``, so that an export draws the same pictures.

    Raises:
        BrokenWeightsError: A weight is not finite in ``dtype``.
    """
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"), quiet_libraries():  # with another default device transformers would need accelerate
        pipeline = _load(path, dtype, device)
    _mend(pipeline, path)
    collect_as_usual()  # the libraries of models are imported
    return pipeline


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Pipeline:
    from diffusers.utils import is_accelerate_available

    # Never load the pickles that some models also have.
    options: dict[str, dict[str, Any]] = {"transformers": {"dtype": dtype, "use_safetensors": True}}
    # diffusers would use this anyway, after printing long advice.
    options["diffusers"] = {**options["transformers"], "low_cpu_mem_usage": is_accelerate_available()}
    model, family = str(path), family_in(path, str(path))
    declared, loaded = declared_parts(path, model), {}
    for name, part in declared.items():
        if part.has_weights:
            kind = part.kinds[0]
            if (place := weights_folder(path, name)) is None:
                module = _from_file(path, name, kind, dtype)
            else:
                module = _load_part(model_class(kind), place, name, options[KINDS[kind].library])
            module = module.eval().requires_grad_(False).to(device)
            _check_finite(module, f"{path / name}", dtype)
            convolves = kind in ("UNet2DConditionModel", "AutoencoderKL")
            loaded[name] = module.to(memory_format=torch.channels_last) if convolves else module
    for name, part in declared.items():
        if part.encoder:
            loaded[name] = load_tokenizer(path, name, part, model, loaded[part.encoder].config)
    index = read_config(path / "model_index.json")
    build: Any = family  # a dataclass
    pipeline: Pipeline = build(**loaded, scheduler=load_scheduler(path, model), **family.options(index))
    return pipeline


def _load_part(kind: Any, path: Path, part: str, options: dict[str, Any]) -> Any:
    """Load a part from a folder, in the variant of its files."""
    return kind.from_pretrained(path, subfolder=part, variant=weight_variant(path, part), **options)


def _from_file(path: Path, part: str, kind: str, dtype: torch.dtype) -> Any:
    """Load a part from the single file that ``path`` stands for."""
    from diffusers.utils import is_accelerate_available

    weights, model = stored_weights(path, part, dtype), model_class(kind)
    values, config = dict(weights), read_config(path / part / "config.json")
    if KINDS[kind].library == "transformers":
        described = model.config_class.from_dict(config.get("text_config") or config)
        return model.from_pretrained(None, config=described, state_dict=values, dtype=dtype)
    if is_accelerate_available():
        from accelerate import init_empty_weights

        with init_empty_weights():
            module = model.from_config(config)
    else:
        module = model.from_config(config)
    module.load_state_dict(values, assign=True)
    return module


class BrokenWeightsError(ValueError):
    """A weight of the base model is not finite."""


def _check_finite(module: nn.Module, place: str, dtype: torch.dtype) -> None:
    for name, value in module.named_parameters():
        if not value.isfinite().all():
            raise BrokenWeightsError(
                f"{place} has the weight {name!r}, which is not finite in {str(dtype).removeprefix('torch.')}: copy "
                "the part again; if the file has numbers too large for float16, choose float32 or bfloat16."
            )


def _mend(pipeline: Pipeline, path: Path) -> None:
    """Let diffusers correct the configurations as it does when it loads the folder, and warn of each change."""
    given = {part: dict(getattr(pipeline, part).config) for part in pipeline.mended}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # advice to correct the files; the warning below replaces it
        pipeline.to_diffusers()
    for part, fields in pipeline.mended.items():
        for field in fields:
            before, after = given[part].get(field), getattr(pipeline, part).config.get(field)
            if before != after:
                with plain_warnings():
                    warnings.warn(
                        f"{path / part}: {field}={before} of 2022 is taken as {after}, as diffusers does on loading.",
                        stacklevel=3,
                    )


__all__ = ["BrokenWeightsError", "check_folder", "check_model", "fetch", "load_parts", "load_pipeline"]
