"""Checks a model folder before a weight is read: classes and configurations of its parts, names of its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_unlearn.diffusion.samplers import make_sampler
from lit_unlearn.diffusion.source import CONVERT, STEMS, read_config, weight_files
from lit_unlearn.diffusion.stored import StoredWeights
from lit_unlearn.system.errors import essence

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import CLIPTokenizer

PIPELINE = "StableDiffusionPipeline"
PARTS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": (),
}
"""Parts of a pipeline, each with the classes that it can be loaded as; there are many classes of schedulers."""
LIBRARIES = ("diffusers", "transformers")
"""Where the classes of these parts come from."""
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that do not change the pictures."""

CONDITIONS = {
    "time_cond_proj_dim": "the guidance scale (it was distilled for few steps)",
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "addition_embed_type": "sizes, pictures or pooled text (as SDXL)",
    "encoder_hid_dim": "states of another width",
    "encoder_hid_dim_type": "states of another kind",
}
"""Fields of a UNet's configuration for inputs besides latents, timesteps and text, with the name of the input."""

ORIGINAL = (
    "cond_stage_model.",
    "model.diffusion_model.",
    "first_stage_model.",
    "input_blocks.",
    "time_embed.",
    "encoder.down.",
    "transformer.resblocks.",
)
"""Beginnings or parts of the names of weights in the original code of Stable Diffusion."""
BROKEN_CONFIG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""Errors that the libraries raise when a model is made from a wrong configuration."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_parts(path: Path, model: str) -> None:
    """Check everything in a model folder except its weights.

    Args:
        path: The folder.
        model: The model's name as the user gave it.

    Raises:
        ValueError: A part or file is missing, the class or configuration of a part is not supported, or two parts do
            not fit together.
    """
    _check_index(path, model)
    parts = {part: _described(path, part, model) for part in STEMS}
    _check_forms(parts["text_encoder"].config, parts["unet"].config, parts["vae"].config, model)
    load_tokenizer(path, model, parts["text_encoder"].config)
    load_scheduler(path, model)


def check_weights(path: Path, model: str) -> dict[str, list[str]]:
    """Compare the weights in the files with those of the models that the configurations describe, by name and shape.

    Returns:
        The names of the weights of ``text_encoder``, ``unet`` and ``vae``.

    Raises:
        ValueError: A part has no weights, a weight is missing, unknown or of another shape, or a file is corrupt.
    """
    names = {}
    for part, stem in STEMS.items():
        if not weight_files(path, part):
            there = ", ".join(sorted(file.name for file in (path / part).iterdir() if file.name != "config.json"))
            if "-of-" in there:
                raise ValueError(
                    f"model={model!r} has its weights in several files in {part}/ ({there}), and no "
                    f"{stem}.safetensors.index.json that lists them: copy it too."
                )
            raise ValueError(
                f"model={model!r} has no *.safetensors in {part}/ that the name {stem} begins (there is "
                f"{there or 'nothing'}): convert it with save_pretrained first."
            )
        module, stored = _described(path, part, model), StoredWeights(path, part)
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        where = f"model={model!r}: {part}/"
        described = f"the {type(module).__name__} that its config.json describes"
        missing = [name for name in expected if name not in stored.described]
        if unknown := [name for name in stored.described if name not in expected]:
            file, name, *_ = stored.described[unknown[0]]
            also = f"{len(unknown) - 1} more unknown, {len(missing)} missing"
            raise ValueError(
                f"{where}{file.name} has the weight {name!r}, which {described} does not have ({also}): "
                f"{_remedy(name, expected)}."
            )
        if missing:
            raise ValueError(
                f"{where} lacks the weight {missing[0]!r} of {described} ({len(missing) - 1} more missing): copy the "
                "part again, with its config.json."
            )
        for name, tensor in stored.described.items():
            if tensor.shape != expected[name]:
                raise ValueError(
                    f"{where}{tensor.file.name} has {name!r} of the shape {tensor.shape}, and {described} has it of "
                    f"{expected[name]}: copy the part again, with its config.json."
                )
            if tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{where}{tensor.file.name} has {name!r} as {tensor.dtype}: quantized weights cannot be edited, "
                    "take those of 16 or 32 bits."
                )
        names[part] = list(stored)
    return names


def load_tokenizer(path: Path, model: str, text_config: Any) -> CLIPTokenizer:
    """Load the tokenizer of a folder; if it has no length, it gets the text encoder's.

    Args:
        path: The folder.
        model: The model's name as the user gave it.
        text_config: Configuration of the text encoder.

    Raises:
        ValueError: The tokenizer's files are missing or broken, or it does not fit the text encoder.
    """
    from transformers import CLIPTokenizer
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    folder = path / "tokenizer"
    has = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    if not (has[0] or all(has[1:])):
        raise ValueError(f"model={model!r} has neither tokenizer.json nor vocab.json and merges.txt in tokenizer/.")
    for file in folder.glob("*.json"):
        read_config(file)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        last = max(tokenizer.get_vocab().values())
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | TypeError | KeyError):
            raise  # the Rust library behind it raises Exception itself
        raise ValueError(f"model={model!r} has a tokenizer that cannot be read: {essence(error)}") from error
    positions = text_config.max_position_embeddings
    if tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        tokenizer.model_max_length = positions
    if tokenizer.model_max_length > positions:
        raise ValueError(
            f"model={model!r}: tokenizer/tokenizer_config.json has model_max_length={tokenizer.model_max_length}, and "
            f"the text encoder reads max_position_embeddings={positions}: set it to {positions}."
        )
    if last >= text_config.vocab_size:
        raise ValueError(
            f"model={model!r}: the tokenizer has a token {last} ({tokenizer.convert_ids_to_tokens(last)!r}), and the "
            f"text encoder embeds vocab_size={text_config.vocab_size}: save both parts of one pipeline."
        )
    return tokenizer


def read_tokenizer(path: Path, model: str) -> CLIPTokenizer:
    """Load the tokenizer of a folder that has been checked."""
    return load_tokenizer(path, model, _described(path, "text_encoder", model).config)


def load_scheduler(path: Path, model: str) -> SchedulerMixin:
    """Load the scheduler of a folder; its class is in ``model_index.json``.

    Raises:
        ValueError: As ``make_sampler``, or a file is broken.
    """
    name = read_config(path / "model_index.json")["scheduler"][1]
    return make_sampler(name, read_config(path / "scheduler" / "scheduler_config.json"), model)


def load_mended_scheduler(path: Path, model: str) -> SchedulerMixin:
    """As ``load_scheduler``, with a configuration of 2022 corrected as diffusers does when it loads the pipeline."""
    from diffusers import StableDiffusionPipeline

    scheduler = load_scheduler(path, model)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the files should be corrected: said on loading
        StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    return scheduler


def _check_index(path: Path, model: str) -> None:
    """Check which parts a folder has, and their classes in ``model_index.json``."""
    if not (path / "model_index.json").is_file():
        there = sorted(entry.name for entry in path.iterdir())
        listed = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise ValueError(
            f"model={model!r} lacks model_index.json (there is {listed or 'nothing'}): a folder in the diffusers "
            f"layout has it and {', '.join(PARTS)}; to convert a single file: {CONVERT}."
        )
    index = read_config(path / "model_index.json")
    entries = {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    parts = {name: entry[1] for name, entry in entries.items()}
    if "_class_name" not in index:
        raise ValueError(f"model={model!r}: {path / 'model_index.json'} has no _class_name: copy it again.")
    others = [name for name in parts if name not in (*PARTS, *OPTIONAL)]
    if (name := index.get("_class_name")) != PIPELINE or others:
        having = f" with {', '.join(others)}" if others else ""
        raise ValueError(
            f"model={model!r} is a {name!s:.100}{having}, which is not supported: only pipelines with a single "
            f"CLIPTextModel, a UNet2DConditionModel and an AutoencoderKL can be edited ({PIPELINE}: Stable Diffusion "
            "1.x and 2.x); if its parts are those, give it that _class_name in model_index.json."
        )
    for part, kinds in PARTS.items():
        if part not in parts or not (path / part).is_dir():
            raise ValueError(f"model={model!r} lacks {part}: a folder in the diffusers layout has {', '.join(PARTS)}.")
        if kinds and parts[part] not in kinds:
            raise ValueError(
                f"model={model!r} has the {part} {parts[part]!r:.100} by its model_index.json: only {kinds[0]} is "
                "supported."
            )
        if (library := entries[part][0]) not in LIBRARIES:
            raise ValueError(
                f"model={model!r} has the {part} {parts[part]!r:.100} of {library!r:.100} by model_index.json, which"
                f" is code of its own: only classes of {' and '.join(LIBRARIES)} are loaded."
            )


def _described(path: Path, part: str, model: str) -> nn.Module:
    """The model described by ``config.json`` of a part, on the meta device: shapes without values."""
    config = read_config(path / part / "config.json")
    if "quantization_config" in config:
        raise ValueError(
            f"model={model!r}: {part}/config.json has a quantization_config: quantized weights cannot be edited, take "
            "those of 16 or 32 bits."
        )
    if "transformers_weights" in config or (path / part / "adapter_config.json").exists():
        raise ValueError(
            f"model={model!r}: {part}/ has an adapter_config.json or names transformers_weights, so that other weights "
            "than its own are loaded: merge them in diffusers and save it again."
        )
    from huggingface_hub.errors import StrictDataclassError  # transformers checks types with it

    try:
        return _on_meta(part, json.dumps(config, sort_keys=True))
    except (*BROKEN_CONFIG, StrictDataclassError) as error:
        kind = PARTS[part][0]
        raise ValueError(f"model={model!r}: {part}/config.json describes no {kind}: {essence(error)}") from error


@lru_cache(maxsize=12)
def _on_meta(part: str, config: str) -> nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    content = json.loads(config)
    with torch.device("meta"):
        if part == "text_encoder":  # some folders have the configuration of a whole CLIP
            return CLIPTextModel(CLIPTextConfig.from_dict(content.get("text_config") or content))
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(content)


def _check_forms(text: Any, unet: Any, vae: Any, model: str) -> None:
    """Check that the pipeline can use the parts' configurations, and that they fit together."""
    for field, what in CONDITIONS.items():
        if (value := unet.get(field)) is not None:
            raise ValueError(
                f"model={model!r}: unet/config.json has {field}={value!r}: it takes {what} as an input, which is not "
                "supported; take the model that it was made from, with text as its only condition."
            )
    latents = {"unet in_channels": unet.in_channels, "unet out_channels": unet.out_channels}
    for field, value in latents.items():
        if value != vae.latent_channels:
            raise ValueError(
                f"model={model!r} has {field}={value} and vae latent_channels={vae.latent_channels}, which must be "
                "equal: models for inpainting, depth, upscaling or editing of pictures are not supported."
            )
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise ValueError(
            f"model={model!r}: vae/config.json has in_channels={vae.in_channels} and out_channels={vae.out_channels}: "
            "pictures have 3."
        )
    widths = unet.cross_attention_dim
    if set(widths if isinstance(widths, list | tuple) else [widths]) != {text.hidden_size}:
        raise ValueError(
            f"model={model!r} has unet cross_attention_dim={widths} and text_encoder hidden_size={text.hidden_size}, "
            "which must be equal: take both from one pipeline."
        )
    size = unet.sample_size
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"model={model!r}: unet/config.json has sample_size={size!r}: give the side of the latents, or their "
            "height and width, e.g. 64 for pictures of 512 pixels."
        )


def _remedy(name: str, expected: Mapping[str, Any]) -> str:
    """What to do about an unknown weight, from its name."""
    if any(name.startswith(start) or f".{start}" in name for start in ORIGINAL):
        return f"the names are those of the original code; convert the single checkpoint that it came from: {CONVERT}"
    if "lora" in name or ".base_layer." in name:
        return "an adapter was saved with it; load it in diffusers, call fuse_lora() and unload_lora_weights(), save it"
    if prefix := next((name.removesuffix(known) for known in expected if name.endswith(f".{known}")), ""):
        return f"save it again without {prefix!r} before the names"
    return "copy the part again, with its config.json"
