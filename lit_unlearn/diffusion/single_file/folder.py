"""Makes the folder that stands for a single file: configurations and tokenizers in diffusers' layout, without weights.

The weights are read from the single file, or from the folder that the user gave for what the file does not hold
(``source.ORIGINS``). A single file describes neither its architecture nor its tokenizers: the first is known of
published models, the others come from the user's folder or from the hub's cache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_unlearn.diffusion.families import FAMILIES
from lit_unlearn.diffusion.parts import KINDS, Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.single_file.architectures import architecture_of, architectures, hub_models
from lit_unlearn.diffusion.single_file.file import SingleFile
from lit_unlearn.diffusion.single_file.layout import PLACES
from lit_unlearn.diffusion.source import ORIGINS, Origin, read_config, resolve_model, weight_files
from lit_unlearn.system.errors import warn
from lit_unlearn.system.files import copy_into, folder_of_the_process

INDEX = "model_index.json"
TOKENIZER_FILES = {
    "CLIPTokenizer": ("vocab.json", "merges.txt"),
    "T5Tokenizer": ("spiece.model",),
}
"""Files of a tokenizer that has no ``tokenizer.json``, by its class."""
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
"""What ``modelspec.prediction_type`` in a file's metadata means to diffusers."""


def local_folder(place: Path, config_folder: str | None, model: str) -> Path:
    """The folder of a model on this machine: ``place`` itself, or a folder that stands for a single file.

    Args:
        place: A folder, or a file of safetensors.
        config_folder: Folder with what a single file does not hold; None if there is none.
        model: The model's name as the user gave it.

    Raises:
        ValueError: The file is not of a known family; it or the folder lacks something; or the folder was given for a
            model that is no single file.
    """
    if place.is_dir():
        check_unused(config_folder, model)
        return place
    found = place.stat()
    return _made(place.absolute(), config_folder, model, found.st_mtime_ns, found.st_size)


def check_unused(config_folder: str | None, model: str) -> None:
    """Refuse a ``config_folder`` for a model that is no single file.

    Raises:
        ValueError: There is one.
    """
    if config_folder is not None:
        raise ValueError(
            f"config_folder={config_folder!r} has no effect: model={model!r} is no single file; leave it out."
        )


@dataclass(frozen=True)
class _Sources:
    """What the folder is made of: the file, what is known of its architecture, and the user's folder."""

    file: SingleFile
    architecture: str
    given: Path | None
    model: str

    @property
    def known(self) -> dict[str, Any]:
        return architectures()[self.architecture]

    @property
    def family(self) -> type[Pipeline]:
        return FAMILIES[self.known["_class"]]

    def in_given(self, part: str) -> bool:
        """Whether the user's folder has the weights of a part."""
        return self.given is not None and (self.given / part).is_dir() and bool(weight_files(self.given, part))


@lru_cache(maxsize=8)
def _made(place: Path, config_folder: str | None, model: str, *changed: int) -> Path:
    file = SingleFile(place, "model")
    sources = _Sources(file, architecture_of(file), _given(config_folder), model)
    _check_family(sources)
    parts = _parts(sources)
    tokenizers = _tokenizers(sources, parts)
    scheduler = _scheduler(sources)
    folder = folder_of_the_process()
    for part, kind in parts.items():
        (folder / part).mkdir()
        _write_config(sources, part, kind, folder / part)
    for part, source in tokenizers.items():
        copy_into(source, folder / part)
    _write(folder / "scheduler", "scheduler_config.json", scheduler)
    entries = {part: [KINDS[kind].library, kind] for part, kind in parts.items()}
    entries |= {part: ["transformers", sources.family.declared[part].kinds[0]] for part in tokenizers}
    index = {} if sources.given is None or not (sources.given / INDEX).is_file() else read_config(sources.given / INDEX)
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    entries["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write(folder, INDEX, {**options, "_class_name": sources.family.index_class, **entries})
    ORIGINS[folder] = Origin(place, tuple(part for part in file.parts if part in parts), sources.given)
    return folder


def _given(config_folder: str | None) -> Path | None:
    if config_folder is None:
        return None
    try:
        found = resolve_model(config_folder)
    except ValueError:
        found = ""
    if not isinstance(found, Path):
        raise ValueError(f"config_folder={config_folder!r} is no folder: give one in the diffusers layout.")
    return found


def _check_family(sources: _Sources) -> None:
    """Refuse files of encoders or autoencoders alone, and a folder of another family."""
    file, family, model = sources.file, sources.family, sources.model
    if "conditioner.embedders.0.model.ln_final.weight" in file.layout.shapes:
        raise ValueError(f"model={model!r} is the refiner of Stable Diffusion XL: give the base model.")
    if family.denoiser_part not in file.parts:
        averaged = " (only an averaged copy of it, model_ema.*)" if file.layout.averaged else ""
        raise ValueError(
            f"model={model!r} holds {_listed(file.parts)} and no denoiser{averaged}: give a checkpoint that has "
            "model.diffusion_model.*."
        )
    if sources.given is not None and (sources.given / INDEX).is_file():
        named = read_config(sources.given / INDEX).get("_class_name")
        if named != family.index_class:
            other = FAMILIES[str(named)].title if named in FAMILIES else f"a {named!s:.100}"
            raise ValueError(
                f"config_folder={str(sources.given)!r} is of {other}, and model={model!r} of {family.title}: give the "
                "folder of a model of the same family."
            )


def _parts(sources: _Sources) -> dict[str, str]:
    """The classes of all parts that hold weights, by name; optional ones that nobody has are left out."""
    found, missing, left_out = dict[str, str](), list[str](), list[str]()
    for part, declared in sources.family.declared.items():
        if not declared.has_weights:
            continue
        if part in sources.file.parts or sources.in_given(part):
            found[part] = declared.kinds[0]
        else:
            (left_out if declared.optional else missing).append(part)
    if missing:
        lacks = f"config_folder={str(sources.given)!r} lacks" if sources.given is not None else "it lacks"
        more = ", and an edit of text encoders is exported as a folder or a delta" if "text_encoder" in missing else ""
        raise ValueError(
            f"model={sources.model!r} holds {_listed(sources.file.parts)} alone, and {lacks} {_listed(missing)}: give "
            f"config_folder=FOLDER, a model of {sources.family.title} in the diffusers layout that has them; they are "
            f"read from there{more}."
        )
    for part in left_out:
        warn(
            f"model={sources.model!r} has no {part} ({PLACES[part]}), and prompts are read without it, as in "
            "diffusers; config_folder=FOLDER with one adds it."
        )
    if others := [part for part in found if part not in sources.file.parts]:
        warn(f"model={sources.model!r} holds no {_listed(others)}: read from config_folder={str(sources.given)!r}.")
    return found


def _tokenizers(sources: _Sources, parts: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the tokenizers of all text encoders that there are: the user's, or those in the hub's cache."""
    declared = sources.family.declared
    wanted = {name: part for name, part in declared.items() if part.encoder and part.encoder in parts}
    found = {name: _tokenizer(sources, name, part) for name, part in wanted.items()}
    missing = [name for name, folder in found.items() if folder is None]
    if missing:
        patterns = " ".join(f'"{name}/*"' for name in missing)
        hub = hub_models(sources.architecture)
        given = f"config_folder={str(sources.given)!r} lacks too" if sources.given else "a single file does not hold"
        raise ValueError(
            f"model={sources.model!r} needs {_listed(missing)}, which {given}: give config_folder=FOLDER with "
            f"{'/, '.join(missing)}/, or download them into the hub's cache with `hf download {hub[0]} --include "
            f"{patterns}`."
        )
    return {name: folder for name, folder in found.items() if folder is not None}


def _tokenizer(sources: _Sources, name: str, declared: Part) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    wanted = [("tokenizer.json",), TOKENIZER_FILES[declared.kinds[0]]]
    places = [] if sources.given is None else [sources.given / name]
    for hub in hub_models(sources.architecture):
        cached = [try_to_load_from_cache(hub, f"{name}/{files[0]}") for files in wanted]
        places += [Path(path).parent for path in cached if isinstance(path, str)]
    for place in places:
        if any(all((place / file).is_file() for file in files) for files in wanted):
            return place
    return None


def _scheduler(sources: _Sources) -> dict[str, Any]:
    """Configuration of the sampler, with what the file says that its denoiser predicts."""
    given = None if sources.given is None else sources.given / "scheduler" / "scheduler_config.json"
    known = sources.known["scheduler"]
    of_user = given is not None and given.is_file()
    config = read_config(given) if given is not None and of_user else {**known, "_class_name": known["_class"]}
    config.pop("_class", None)
    if sources.family.flow:
        return config
    keys = sources.file.layout.shapes
    said = PREDICTIONS.get(sources.file.metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in keys:
        said = "v_prediction"
    if said is not None:
        config["prediction_type"] = said
    elif sources.architecture == "sd2" and not of_user:
        raise ValueError(
            f"model={sources.model!r} is of Stable Diffusion 2 and does not say whether it predicts noise or a "
            "velocity: give config_folder=FOLDER with scheduler/scheduler_config.json."
        )
    if "ztsnr" in keys:
        config["rescale_betas_zero_snr"] = True
    return config


def _write_config(sources: _Sources, part: str, kind: str, folder: Path) -> None:
    """Write the configuration of a part: the user's, else the known one."""
    place = None if sources.given is None else sources.given / part
    if place is not None and (place / "config.json").is_file():
        for file in place.glob("*.json"):
            if not file.name.endswith(".index.json") and ".safetensors.index." not in file.name:
                shutil.copyfile(file, folder / file.name)
        return
    known = dict(sources.known[part])
    known.pop("_class")
    named = {"architectures": [kind]} if KINDS[kind].library == "transformers" else {"_class_name": kind}
    _write(folder, "config.json", {**named, **known})


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
