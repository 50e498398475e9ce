"""Checks a model folder before a weight is read: classes and configurations of its parts, names of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_unlearn.diffusion.families import FAMILIES, StableDiffusion
from lit_unlearn.diffusion.families.forms import check_equal
from lit_unlearn.diffusion.lower_case import lower
from lit_unlearn.diffusion.noise import NoiseProcess
from lit_unlearn.diffusion.parts import Part, described_model, weights_of
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import PromptReader
from lit_unlearn.diffusion.samplers import make_sampler
from lit_unlearn.diffusion.single_file.file import DTYPES
from lit_unlearn.diffusion.source import ORIGINS, STEMS, read_config, weight_files, weights_folder
from lit_unlearn.diffusion.stored import stored_weights
from lit_unlearn.system.errors import essence

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

LIBRARIES = ("diffusers", "transformers")
"""Where the classes of these parts come from."""
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that do not change the pictures."""

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
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names of files with LoRA weights, as peft and diffusers write them."""
ROUNDED = 128
"""A T5 embeds this many tokens more than there are at most: the number is a multiple of it."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def family_in(path: Path, model: str) -> type[Pipeline]:
    """The family of the pipeline in a folder, by its ``model_index.json``.

    Raises:
        ValueError: The family is not known, or a part is missing or of another class.
    """
    return FAMILIES[_check_index(path, model)["_class_name"]]


def declared_parts(path: Path, model: str) -> dict[str, Part]:
    """The parts that a folder has of the ones that its family declares, by name.

    Raises:
        ValueError: As ``family_in``.
    """
    index = _check_index(path, model)
    declared = FAMILIES[index["_class_name"]].declared
    return {name: part for name, part in declared.items() if name in _entries(index)}


def check_parts(path: Path, model: str) -> None:
    """Check everything in a model folder except its weights.

    Args:
        path: The folder.
        model: The model's name as the user gave it.

    Raises:
        ValueError: A part or file is missing, the class or configuration of a part is not supported, or two parts do
            not fit together.
    """
    family = family_in(path, model)
    family.check_forms({part: module.config for part, module in _modules(path, model).items()}, model)
    read_tokenizers(path, model)
    load_scheduler(path, model)


def check_weights(path: Path, model: str) -> dict[str, list[str]]:
    """Compare the weights in the files with those of the models that the configurations describe, by name and shape.

    Returns:
        The names of the parameters of each part that has some, such as ``unet``, in the order of its files.

    Raises:
        ValueError: A part has no weights, a weight is missing, unknown or of another shape, or a file is corrupt.
    """
    names = {}
    for part, module in _modules(path, model).items():
        stem = STEMS[part]
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
        stored = stored_weights(path, part)
        expected = {name: tuple(value.shape) for name, value in weights_of(module).items()}
        where, described = f"model={model!r}: {part}/", f"the {type(module).__name__} that its config.json describes"
        copy = "copy the part again, with its config.json"
        floats: tuple[str, ...] = FLOATS
        if weights_folder(path, part) is None:  # in a single file
            floats = tuple(DTYPES)
            where = f"model={model!r} ({part}): "
            described = f"the {type(module).__name__} of {family_in(path, model).title}"
            copy = "give a whole model that draws from text alone, or config_folder=FOLDER with its own config.json"
        missing = [name for name in expected if name not in stored.described]
        if unknown := [name for name in stored.described if name not in expected]:
            file, name, *_ = stored.described[unknown[0]]
            also = f"{len(unknown) - 1} more unknown, {len(missing)} missing"
            raise ValueError(
                f"{where}{file.name} has the weight {name!r}, which {described} does not have ({also}): "
                f"{_remedy(name, expected, copy)}."
            )
        if missing:
            raise ValueError(
                f"{where} lacks the weight {missing[0]!r} of {described} ({len(missing) - 1} more missing): {copy}."
            )
        for name, tensor in stored.described.items():
            if tensor.shape != expected[name]:
                raise ValueError(
                    f"{where}{tensor.file.name} has {name!r} of the shape {tensor.shape}, and {described} has it of "
                    f"{expected[name]}: {copy}."
                )
            if tensor.dtype not in floats:
                raise ValueError(
                    f"{where}{tensor.file.name} has {name!r} as {tensor.dtype}: quantized weights cannot be edited, "
                    "take those of 16 or 32 bits."
                )
        parameters = {name for name, _ in module.named_parameters()}
        names[part] = [name for name in stored if name in parameters]
    return names


def load_tokenizer(path: Path, part: str, declared: Part, model: str, text_config: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer of a folder; if it has no length, it gets the text encoder's.

    Args:
        path: The folder.
        part: Name of the tokenizer.
        declared: What its family says of it.
        model: The model's name as the user gave it.
        text_config: Configuration of its text encoder.

    Raises:
        ValueError: The tokenizer's files are missing or broken, or it does not fit the text encoder.
    """
    import transformers
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    folder, encoder = path / part, declared.encoder
    of_a_clip = declared.kinds[0].startswith("CLIP")
    others = ("vocab.json", "merges.txt") if of_a_clip else ("spiece.model",)
    if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in others)):
        raise ValueError(f"model={model!r} has neither tokenizer.json nor {' and '.join(others)} in {part}/.")
    for file in folder.glob("*.json"):
        read_config(file)
    try:
        tokenizer = getattr(transformers, declared.kinds[0]).from_pretrained(folder)
        last = max(tokenizer.get_vocab().values())
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | TypeError | KeyError):
            raise  # the Rust library behind it raises Exception itself
        raise ValueError(f"model={model!r} has a {part} that cannot be read: {essence(error)}") from error
    who = "the text encoder" if encoder == "text_encoder" else encoder
    positions = getattr(text_config, "max_position_embeddings", None)  # a T5 reads any number
    if positions is not None and tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        tokenizer.model_max_length = positions
    if positions is not None and tokenizer.model_max_length > positions:
        raise ValueError(
            f"model={model!r}: {part}/tokenizer_config.json has model_max_length={tokenizer.model_max_length}, and "
            f"{who} reads max_position_embeddings={positions}: set it to {positions}."
        )
    if last >= text_config.vocab_size:
        raise ValueError(
            f"model={model!r}: the {part} has a token {last} ({tokenizer.convert_ids_to_tokens(last)!r}), and {who} "
            f"embeds vocab_size={text_config.vocab_size}: save both parts of one pipeline."
        )
    unused = text_config.vocab_size - 1 - last
    if path in ORIGINS and unused > (0 if of_a_clip else ROUNDED):  # in a folder it was saved beside its encoder
        raise ValueError(
            f"model={model!r}: the {part} knows {last + 1} tokens, and {who} embeds vocab_size="
            f"{text_config.vocab_size}: give config_folder=FOLDER with the {part} of that model."
        )
    if declared.lowers:
        lower(tokenizer)
    return tokenizer  # type: ignore[no-any-return]


def read_tokenizers(path: Path, model: str) -> dict[str, PreTrainedTokenizerBase]:
    """Load all tokenizers of a folder, by name.

    Raises:
        ValueError: As ``load_tokenizer``, or two tokenizers of CLIPs have different lengths.
    """
    found, declared = {}, declared_parts(path, model)
    lengths = {}
    for part, of in declared.items():
        if of.encoder:
            config = _described(path, of.encoder, declared[of.encoder].kinds[0], model).config
            found[part] = load_tokenizer(path, part, of, model, config)
            if of.length is None:
                lengths[f"{part} model_max_length"] = found[part].model_max_length
    check_equal(lengths, model)
    return found


def read_prompts(path: Path, model: str) -> PromptReader:
    """The reader of prompts of a folder that has been checked, without its text encoders."""
    tokenizers, declared = read_tokenizers(path, model), declared_parts(path, model)
    lengths = {part: tokenizer.model_max_length for part, tokenizer in tokenizers.items()}
    for part in tokenizers:
        if (most := declared[part].length) is not None:
            lengths[part] = min(most, lengths[part])
    encoders = tuple(declared[part].encoder for part in tokenizers)
    return PromptReader(tuple(tokenizers.values()), tuple(lengths.values()), encoders)


def read_process(path: Path, model: str) -> NoiseProcess:
    """The noise process of a folder that has been checked, with its configuration corrected as it is on loading."""
    family, scheduler = family_in(path, model), load_scheduler(path, model)
    if family is StableDiffusion:
        scheduler = load_mended_scheduler(path, model)
    return family.process(scheduler, read_config(path / family.denoiser_part / "config.json"))


def load_scheduler(path: Path, model: str) -> SchedulerMixin:
    """Load the scheduler of a folder; its class is in ``model_index.json``.

    Raises:
        ValueError: As ``make_sampler``, or a file is broken.
    """
    name = read_config(path / "model_index.json")["scheduler"][1]
    config = read_config(path / "scheduler" / "scheduler_config.json")
    return make_sampler(name, config, model, flow=family_in(path, model).flow)


def load_mended_scheduler(path: Path, model: str) -> SchedulerMixin:
    """As ``load_scheduler``, with a configuration of 2022 corrected as diffusers does when it loads the pipeline."""
    from diffusers import StableDiffusionPipeline

    scheduler = load_scheduler(path, model)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the files should be corrected: said on loading
        StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    return scheduler


def _check_index(path: Path, model: str) -> dict[str, Any]:
    """Check which parts a folder has, and their classes in ``model_index.json``; return its content."""
    if not (path / "model_index.json").is_file():
        there = sorted(entry.name for entry in path.iterdir())
        if any(name in there for name in ADAPTERS):
            raise ValueError(
                f"model={model!r} holds LoRA weights, no model: give the model, or merge both in diffusers with "
                "fuse_lora() and unload_lora_weights(), and save it."
            )
        listed = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise ValueError(
            f"model={model!r} lacks model_index.json (there is {listed or 'nothing'}): a folder in the diffusers "
            f"layout has it and {', '.join(StableDiffusion.declared)}; a single file is given as FILE.safetensors."
        )
    index = read_config(path / "model_index.json")
    if "_class_name" not in index:
        raise ValueError(f"model={model!r}: {path / 'model_index.json'} has no _class_name: copy it again.")
    if (name := index["_class_name"]) not in FAMILIES:
        known = ", ".join(f"{kind} ({family.title})" for kind, family in FAMILIES.items())
        raise ValueError(
            f"model={model!r} is a {name!s:.100}, which is not supported: known are {known}; if its parts are those of "
            "one of these, give it that _class_name in model_index.json."
        )
    family, entries = FAMILIES[name], _entries(index)
    if others := [part for part in entries if part not in (*family.declared, *OPTIONAL)]:
        raise ValueError(
            f"model={model!r} is a {name} with {', '.join(others)}, which is not supported: only pipelines with "
            f"{family.form} can be edited ({name}: {family.title})."
        )
    needed = [part for part, declared in family.declared.items() if not declared.optional]
    for part, declared in family.declared.items():
        if part not in entries and declared.optional:
            continue
        if part not in entries or not (path / part).is_dir():
            raise ValueError(f"model={model!r} lacks {part}: a {name} has {', '.join(needed)}.")
        library, kind = entries[part]
        if declared.kinds and kind not in declared.kinds:
            raise ValueError(
                f"model={model!r} has the {part} {kind!r:.100} by its model_index.json: only {declared.kinds[0]} is "
                "supported."
            )
        if library not in LIBRARIES:
            raise ValueError(
                f"model={model!r} has the {part} {kind!r:.100} of {library!r:.100} by model_index.json, which"
                f" is code of its own: only classes of {' and '.join(LIBRARIES)} are loaded."
            )
        if declared.encoder and declared.encoder not in entries:
            raise ValueError(f"model={model!r} has {part} and no {declared.encoder}: add it, or remove both.")
    return index


def _entries(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Library and class of each part in the content of ``model_index.json`` that is not left out."""
    lists = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: entry for name, entry in lists.items() if entry[1] is not None}


def _modules(path: Path, model: str) -> dict[str, nn.Module]:
    """The parts of a folder that have weights, as their configurations describe them."""
    parts = declared_parts(path, model)
    return {name: _described(path, name, part.kinds[0], model) for name, part in parts.items() if part.has_weights}


def _described(path: Path, part: str, kind: str, model: str) -> nn.Module:
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
        return described_model(kind, config)
    except (*BROKEN_CONFIG, StrictDataclassError) as error:
        raise ValueError(f"model={model!r}: {part}/config.json describes no {kind}: {essence(error)}") from error


def _remedy(name: str, expected: Mapping[str, Any], otherwise: str) -> str:
    """What to do about an unknown weight, from its name."""
    if any(name.startswith(start) or f".{start}" in name for start in ORIGINAL):
        return "the names are those of the original code; give the single file that it came from as the model"
    if "lora" in name or ".base_layer." in name:
        return "an adapter was saved with it; load it in diffusers, call fuse_lora() and unload_lora_weights(), save it"
    if prefix := next((name.removesuffix(known) for known in expected if name.endswith(f".{known}")), ""):
        return f"save it again without {prefix!r} before the names"
    return otherwise
