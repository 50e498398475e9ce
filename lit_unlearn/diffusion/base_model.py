"""The model that an edit is made on: found and checked once, with weights that are read and hashed at most once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.diffusion.check import family_in, read_process, read_prompts
from lit_unlearn.diffusion.clip_skip import Places, check_clip_skip, check_number, places_of, unread_weights
from lit_unlearn.diffusion.hub import cached_snapshot
from lit_unlearn.diffusion.load import check_folder, fetch, load_parts
from lit_unlearn.diffusion.noise import Sampler
from lit_unlearn.diffusion.parameters import Fingerprint, fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import PromptReader
from lit_unlearn.diffusion.provenance import recorded_clip_skip
from lit_unlearn.diffusion.samplers import check_steps
from lit_unlearn.diffusion.single_file.folder import check_unused, local_folder
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.system.errors import warn


class BaseModel:
    """A base model; a command makes one with ``BaseModel.find`` and passes it on.

    Hashes are stored, so no file is hashed twice. If the pipeline is loaded anyway, it can be passed as ``loaded``
    before it is edited; then its weights are hashed instead of the files.

    Attributes:
        name: The model as the user gave it.
        revision: Branch, tag or commit, if it is a hub id.
        config_folder: Folder with what a single file does not hold, as the user gave it.
        clip_skip: Layers that prompts are read earlier (``diffusion.clip_skip``); None for none.
        place: Its folder or single file, or the hub id.
        folder: Folder of its files, or the one that stands for a single file; None for a hub id that is not downloaded
            yet.
        names: Full names of its weights, from the headers of its files; empty without a folder.
    """

    def __init__(
        self, name: str, revision: str | None, config_folder: str | None = None, clip_skip: int | None = None
    ) -> None:
        check_number(clip_skip)
        self.name, self.revision, self.config_folder, self.clip_skip = name, revision, config_folder, clip_skip
        self.place = resolve_model(name, single_file=True)
        self.folder: Path | None = None
        self.names: list[str] = []
        self._read: dict[tuple[str, torch.dtype], Tensor] = {}
        self._sha256: dict[torch.dtype, dict[str, str]] = {}
        self._fingerprints: dict[tuple[frozenset[str], torch.dtype], str] = {}

    @classmethod
    def find(
        cls,
        model: str,
        revision: str | None = None,
        config_folder: str | None = None,
        clip_skip: int | None = None,
    ) -> BaseModel:
        """Find and check a model, without reading its weights.

        Args:
            model: A folder in the diffusers layout, a single file of safetensors, ``emoji-sd``, or a hub id.
            revision: Branch, tag or commit of a hub id.
            config_folder: Folder with the tokenizers of a single file, and with the parts that it does not hold.
            clip_skip: Layers that prompts are read earlier, as in diffusers; None for none.

        Raises:
            ValueError: As ``check_model``, ``local_folder`` and ``check_clip_skip``.
        """
        base = cls(model, revision, config_folder, clip_skip)
        if isinstance(base.place, Path):
            folder: Path | None = local_folder(base.place, config_folder, model)
        else:
            check_unused(config_folder, model)
            folder = cached_snapshot(base.place, revision)
        if folder is not None:
            base._check(folder)
        own = recorded_clip_skip(base.place)
        if own not in (None, clip_skip):
            warn(f"{model} was edited with clip_skip={own}, which its pictures need too: give {own} as clip_skip.")
        return base

    def fetch(self) -> Path:
        """The folder of the model; a model of the hub is downloaded and checked at the first call.

        Raises:
            ValueError: As ``download`` and ``check_folder``.
        """
        if self.folder is None:
            assert isinstance(self.place, str)
            self._check(fetch(self.place, self.revision))
        assert self.folder is not None
        return self.folder

    def _check(self, folder: Path) -> None:
        parts = check_folder(folder, self.name)
        self.names = [f"{part}.{name}" for part, found in parts.items() for name in found]
        self._check_clip_skip(family_in(folder, self.name))
        self.folder = folder

    def _check_clip_skip(self, family: type[Pipeline]) -> None:
        check_clip_skip(self.clip_skip, family, self.names, self.name)

    @cached_property
    def family(self) -> type[Pipeline]:
        """The class of its pipeline; a model of the hub is downloaded for this."""
        return family_in(self.fetch(), self.name)

    @property
    def read_after(self) -> Places:
        """``Pipeline.read_after``, with clip skip."""
        return places_of(self.family, self.clip_skip)

    def unread(self, names: Sequence[str]) -> list[str]:
        """Those of the full names ``names`` that the condition of no prompt depends on; see ``unread_weights``."""
        return unread_weights(self.family, names, self.clip_skip)

    @property
    def single_file(self) -> Path | None:
        """The single file that it is; None for a folder or a model of the hub."""
        return self.place if isinstance(self.place, Path) and not self.place.is_dir() else None

    @property
    def commit(self) -> str | None:
        """The commit of a model of the hub (the name of its folder in the cache); None before it is downloaded."""
        return self.folder.name if self.folder is not None and isinstance(self.place, str) else None

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Pipeline:
        """Load the pipeline, as ``load_pipeline``; this frees the values that ``weights`` has kept."""
        self._read.clear()
        loaded: Any = load_parts(self.fetch(), dtype, device)
        return loaded if self.clip_skip is None else replace(loaded, clip_skip=self.clip_skip)

    def check_steps(self, num_inference_steps: int, field: str, kind: Sampler = "model") -> None:
        """Check that the sampler can take this number of steps; not possible for a hub id that is not downloaded.

        Args:
            num_inference_steps: The number of steps.
            field: The argument that it comes from, for the message.
            kind: The sampler, as in ``Pipeline.with_sampler``.

        Raises:
            ValueError: The sampler cannot take this number of steps.
        """
        if self.folder is not None:
            process = read_process(self.folder, self.name).with_sampler(kind)
            check_steps(process.scheduler, num_inference_steps, field, **process.step_arguments(num_inference_steps))

    @cached_property
    def reader(self) -> PromptReader | None:
        """Reads prompts as the text encoders do; None for a hub id that is not downloaded."""
        return None if self.folder is None else read_prompts(self.folder, self.name)

    # --- weights, without a pipeline

    def weight_names(self) -> list[str]:
        """Full names of all weights; a model of the hub is downloaded for this."""
        return self._stored.names()

    def weights(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Values of some weights in ``dtype``, kept until the pipeline is loaded; None if a weight is missing."""
        names, whole = list(names), self._stored
        if not set(names) <= set(whole.names()):
            return None
        for name in names:
            if (name, dtype) not in self._read:
                self._read[name, dtype] = whole[name].to(dtype)
        return {name: self._read[name, dtype] for name in names}

    def values(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """All weights in ``dtype`` by full name, one after the other; after the last one ``sha256`` is known."""
        hashes = {}
        for part, weights in self._stored.parts.items():
            found = Fingerprint()
            for name in sorted(weights):
                full = f"{part}.{name}"
                value = self._read[full, dtype] if (full, dtype) in self._read else weights[name].to(dtype)
                found.add(name, value)
                yield full, value
            hashes[part] = found.hexdigest()
        self._sha256[dtype] = hashes

    # --- hashes

    def sha256(self, dtype: torch.dtype, loaded: Pipeline | None = None) -> dict[str, str]:
        """SHA-256 of each part in ``dtype``, as ``WholeModel.sha256``; ``loaded`` is hashed if it is given."""
        if dtype not in self._sha256 and loaded is not None:
            self._sha256[dtype] = WholeModel.loaded(loaded).sha256()
        if dtype not in self._sha256:
            for _ in self.values(dtype):
                pass
        return self._sha256[dtype]

    def fingerprint(
        self, names: Iterable[str], dtype: torch.dtype, loaded: Mapping[str, Tensor] | None = None
    ) -> str | None:
        """Hash of some weights in ``dtype``, of the values in ``loaded`` if given; None if a weight is missing."""
        key = frozenset(names), dtype
        if key not in self._fingerprints:
            values = self.weights(key[0], dtype) if loaded is None else {name: loaded[name] for name in key[0]}
            if values is None:
                return None
            self._fingerprints[key] = fingerprint(values)
        return self._fingerprints[key]

    @cached_property
    def _stored(self) -> WholeModel:
        """The weights in the files; each is read when it is used."""
        return WholeModel.in_folder(self.fetch())
