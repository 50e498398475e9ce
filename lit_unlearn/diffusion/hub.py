"""Models of the Hugging Face hub: taken from its cache, or else looked up once and downloaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from json import JSONDecodeError
from pathlib import Path

from lit_unlearn.diffusion.source import STEMS, chosen_weights, weight_files, weighted_parts
from lit_unlearn.system.errors import essence, plain_warnings

CONFIGURATIONS = [
    *("model_index.json", "LICENSE*", "NOTICE*"),
    *(f"{part}/*.{ending}" for part in (*STEMS, "tokenizer*", "scheduler") for ending in ("json", "txt")),
]
"""Patterns of the files that are downloaded before the weights."""
TIMEOUT = 10.0
"""Time limit of a look-up, in seconds."""


def cached_snapshot(model: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, if no look-up is needed: it is given by its commit, or the hub is offline.

    Returns:
        The folder; None if the model must be looked up or files are missing.
    """
    from huggingface_hub import constants

    is_commit = re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
    return _whole_snapshot(model, revision) if is_commit or constants.HF_HUB_OFFLINE else None


def download(model: str, revision: str | None, check: Callable[[Path], object]) -> Path:
    """The folder of a model in the cache, after one look-up; missing files are downloaded, the weights last.

    Args:
        model: Hub id.
        revision: Branch, tag or commit; None takes the main branch.
        check: Called with the folder when it has everything except weights; if it raises an error, the download ends.

    Raises:
        ValueError: The model or revision does not exist, it is private or gated, it has no readable weights, or the hub
            cannot be reached and the model is not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,  # type: ignore[attr-defined]  # of httpx or its successor, as the hub's client uses it
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    if Path(model).parent.is_dir():  # perhaps a mistyped path
        with plain_warnings():
            warnings.warn(f"There is no folder {model}; it is looked for on the hub.", stacklevel=2)
    try:
        found = HfApi().model_info(model, revision=revision, timeout=TIMEOUT)
        files = [file.rfilename for file in found.siblings or []]
        weights = _weight_patterns(files, model)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=CONFIGURATIONS))
        check(folder)
        return Path(snapshot_download(model, revision=folder.name, allow_patterns=weights))
    except GatedRepoError as error:
        raise ValueError(
            f"model={model!r} asks for consent: accept its terms on https://huggingface.co/{model}, then run "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"model={model!r} has no revision={revision!r} on the hub: give a branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model={model!r}: there is no such folder and no such model on the hub (a private one needs `hf auth "
            "login`)."
        ) from error
    except (HTTPError, OfflineModeIsEnabled, EntryNotFoundError, JSONDecodeError) as error:
        if (snapshot := _whole_snapshot(model, revision)) is not None:
            reason = f"The hub cannot be reached; {model}{at} is taken from the cache, commit {snapshot.name}."
            with plain_warnings():
                warnings.warn(reason, stacklevel=2)
            return snapshot
        raise ValueError(
            f"model={model!r}: there is no such folder, and the hub, where it was looked for, cannot be reached "
            f"({type(error).__name__}: {essence(error):.200}); the cache lacks its model_index.json or weights{at}: "
            f"run `{command(model, revision)}` where there is a network, with HF_HOME set to the same cache, or give "
            "a folder in the diffusers layout."
        ) from error


def command(model: str, revision: str | None) -> str:
    """The command that downloads a model into the cache."""
    at = f" --revision {revision}" if revision else ""
    return f'hf download {model}{at} --include "*.json" "*.txt" "*/*.safetensors"'


def _weight_patterns(files: Sequence[str], model: str) -> list[str]:
    """Names and patterns of the weight files to download: one variant of each part."""
    patterns = []
    for part, stem in STEMS.items():
        names = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
        chosen = chosen_weights(part, names, f"model={model!r} on the hub, in {part}/,")
        if chosen is None and names:
            raise ValueError(
                f"model={model!r} has no {stem}.safetensors in {part}/ on the hub (there is "
                f"{', '.join(sorted(names))}): take a revision that has it, or convert it with save_pretrained."
            )
        if chosen is None:
            continue  # the part is missing, which ``check`` reports
        variant, file = chosen
        patterns.append(f"{part}/{file}")
        if file.endswith(".json"):
            middle = f".{variant}" if variant else ""
            patterns += [f"{part}/{stem}{middle}-*-of-*.safetensors", f"{part}/{stem}-*-of-*{middle}.safetensors"]
    return patterns


def _whole_snapshot(model: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, if all its weights are in it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    try:
        return folder if all(weight_files(folder, part) for part in weighted_parts(folder)) else None
    except ValueError:  # a shard is missing, or the index is broken
        return None
