"""Models without weights: what their configurations say, for a plan of a fit (``lit-unlearn plan``).

base = DescribedModel.find("flux1_dev")       # or a folder with configurations, or a hub id
base.names                                    # full names of all weights
base.pipeline(torch.bfloat16)                 # all parts on the meta device: shapes without values
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.check import declared_parts, family_in, load_scheduler
from lit_unlearn.diffusion.hub import cached_snapshot
from lit_unlearn.diffusion.parts import KINDS, described_model
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import PromptReader
from lit_unlearn.diffusion.single_file.architectures import architectures
from lit_unlearn.diffusion.source import read_config
from lit_unlearn.system.files import folder_of_the_process

ARCHITECTURES = {
    "CompVis/stable-diffusion-v1-4": "sd1",
    "runwayml/stable-diffusion-v1-5": "sd1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-dev": "flux1_dev",
    "black-forest-labs/FLUX.1-schnell": "flux1_schnell",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "pixart_alpha",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart_sigma",
}
"""The architecture of models of the hub, which need not be downloaded for a plan."""
T5_LENGTH = 512
"""Limit of a T5's tokenizer; its family may have a lower one."""


class DescribedModel(BaseModel):
    """A base model of which only the configurations are known, with no check that its weights fit them.

    Attributes:
        architecture: Name of the published architecture, if it stands for the model's own configurations.
    """

    architecture: str | None = None

    @classmethod
    def find(
        cls,
        model: str,
        revision: str | None = None,
        config_folder: str | None = None,
        clip_skip: int | None = None,
    ) -> DescribedModel:
        """Find the configurations of a model.

        Args:
            model: A folder in the diffusers layout, whose weights may be missing; a model of the hub; or the name of
                an architecture, as in ``architectures``.
            revision: Branch, tag or commit of a model of the hub.
            config_folder: As for ``BaseModel.find``; it makes no difference here.
            clip_skip: As for ``BaseModel.find``.

        Raises:
            ValueError: The model is none of these, or its configurations contradict each other.
        """
        known = architectures()
        if model in known:
            return cls._of_architecture(model, model, clip_skip)
        found = cls(model, revision, config_folder, clip_skip)
        if isinstance(found.place, str):
            snapshot = cached_snapshot(found.place, revision)
            if snapshot is None and model in ARCHITECTURES:
                return cls._of_architecture(model, ARCHITECTURES[model], clip_skip)
            if snapshot is None:
                raise ValueError(
                    f"model={model!r} is not downloaded, and its architecture is not known: give a folder with its "
                    f"model_index.json and the config.json of its parts, or one of {', '.join(known)}."
                )
            found._describe(snapshot)
        elif found.place.is_file():
            raise ValueError(
                f"model={model!r} is a single file, which does not describe its architecture: give the architecture, "
                f"one of {', '.join(known)}."
            )
        else:
            found._describe(found.place)
        return found

    @classmethod
    def _of_architecture(cls, model: str, name: str, clip_skip: int | None) -> DescribedModel:
        folder = _folder_of(name)
        found = cls(str(folder), None, clip_skip=clip_skip)
        found.name, found.architecture = model, name
        found._describe(folder)
        return found

    def _describe(self, folder: Path) -> None:
        family, self.folder = family_in(folder, self.name), folder
        described = self._modules()
        family.check_forms({part: module.config for part, module in described.items()}, self.name)
        self.names = [f"{part}.{name}" for part, module in described.items() for name, _ in module.named_parameters()]
        self._check_clip_skip(family)

    def _modules(self) -> dict[str, Any]:
        """Each part with weights, on the meta device."""
        assert self.folder is not None
        declared = declared_parts(self.folder, self.name)
        return {
            name: described_model(part.kinds[0], read_config(self.folder / name / "config.json"))
            for name, part in declared.items()
            if part.has_weights
        }

    @property
    def reader(self) -> PromptReader | None:  # type: ignore[override]
        """None: the tokenizers may be missing."""
        return None

    def parts_with_weights(self) -> list[str]:
        """Names of the parts that have weights."""
        return list(self._modules())

    def parts(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The parts with weights, frozen, in ``dtype`` on the meta device."""
        return {
            name: copy.deepcopy(module)._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
            for name, module in self._modules().items()
        }

    def pipeline(self, dtype: torch.dtype) -> Pipeline:
        """The pipeline on the meta device; its tokenizers know the number of tokens only."""
        assert self.folder is not None
        parts: dict[str, Any] = {
            name: module.eval().requires_grad_(False) for name, module in self.parts(dtype).items()
        }
        for name, part in declared_parts(self.folder, self.name).items():
            if part.encoder:
                positions = getattr(parts[part.encoder].config, "max_position_embeddings", None)
                begins = None if positions is None else 0  # a CLIP has both, a T5 neither
                parts[name] = SimpleNamespace(
                    model_max_length=positions or T5_LENGTH, pad_token_id=0, bos_token_id=begins
                )
        family: Any = self.family
        index = read_config(self.folder / "model_index.json")
        scheduler = load_scheduler(self.folder, self.name)
        options = family.options(index) | ({} if self.clip_skip is None else {"clip_skip": self.clip_skip})
        made: Pipeline = family(**parts, scheduler=scheduler, **options)
        return made


@cache
def _folder_of(name: str) -> Path:
    """A folder with the configurations of an architecture."""
    folder = folder_of_the_process()
    _write_folder(architectures()[name], folder)
    return folder


def _write_folder(architecture: Mapping[str, Any], folder: Path) -> None:
    """Write the configurations of an architecture in diffusers' layout; the folders of its tokenizers stay empty."""
    from lit_unlearn.diffusion.families import FAMILIES

    family = FAMILIES[architecture["_class"]]
    index: dict[str, Any] = {"_class_name": architecture["_class"]}
    for name, part in family.declared.items():
        (folder / name).mkdir()
        config = dict(architecture.get(name, {}))
        kind = config.pop("_class", part.kinds[0] if part.kinds else "")
        if name == "scheduler":
            _write(folder / name / "scheduler_config.json", {"_class_name": kind, **config})
            index[name] = ["diffusers", kind]
            continue
        index[name] = [KINDS[kind].library if part.has_weights else "transformers", kind]
        if part.has_weights:
            _write(folder / name / "config.json", config)
    _write(folder / "model_index.json", index)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


__all__ = ["ARCHITECTURES", "DescribedModel"]
