"""The parts of a pipeline as its family declares them, and the classes that they are loaded as."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """A part of a pipeline.

    Attributes:
        kinds: Classes that ``model_index.json`` may name for it; it is loaded as the first. Empty for a scheduler.
        optional: Whether the pipeline can do without it.
        encoder: Of a tokenizer: the name of its text encoder; empty for other parts.
        length: Of a tokenizer: most tokens that its text encoder reads, if the tokenizer has no lower limit of its own.
        lowers: Of a tokenizer: whether the pipeline makes prompts lower case before it reads them.
    """

    kinds: tuple[str, ...] = ()
    optional: bool = False
    encoder: str = ""
    length: int | None = None
    lowers: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether it is a model."""
        return bool(self.kinds) and not self.encoder


@dataclass(frozen=True)
class Kind:
    """A class of models.

    Attributes:
        library: Where it comes from.
        prefix: Prefix that files put before the names of its weights, and the loaded model does not.
        ignored: Names of tensors in its files that it does not load.
        renamed: Pieces of names of older files, with what they are when loaded.
    """

    library: str
    prefix: str = ""
    ignored: re.Pattern[str] = re.compile("$^")
    renamed: Mapping[str, str] = field(default_factory=dict)

    def parameter_name(self, stored: str) -> str:
        """The name that the parameter ``stored`` in a file has in the loaded model."""
        stored = stored.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            stored = stored.replace(old, new)
        return stored


# What transformers ignores: position ids of 2022, the other half of a whole CLIP, a T5 that also writes. A T5 has the
# embeddings of its vocabulary under two names.
CLIP_REST = r"visual_projection\.weight|logit_scale|vision_model\..+"
T5_REST = r"encoder\.embed_tokens\.weight|decoder\..+|lm_head\.weight"

KINDS: dict[str, Kind] = {
    "CLIPTextModel": Kind(
        "transformers", "text_model.", re.compile(rf".*\bposition_ids|text_projection\.weight|{CLIP_REST}")
    ),
    "CLIPTextModelWithProjection": Kind("transformers", ignored=re.compile(rf".*\bposition_ids|{CLIP_REST}")),
    "T5EncoderModel": Kind("transformers", ignored=re.compile(T5_REST)),
    "UNet2DConditionModel": Kind("diffusers"),
    "SD3Transformer2DModel": Kind("diffusers"),
    "FluxTransformer2DModel": Kind("diffusers"),
    "PixArtTransformer2DModel": Kind("diffusers"),
    # Names that diffusers changes when it loads an autoencoder of 2022.
    "AutoencoderKL": Kind(
        "diffusers",
        renamed={".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."},
    ),
}
"""The classes of models that are loaded."""


def model_class(kind: str) -> Any:
    """The class named ``kind``, one of ``KINDS``."""
    import diffusers
    import transformers

    return getattr({"diffusers": diffusers, "transformers": transformers}[KINDS[kind].library], kind)


def described_model(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The model of the class ``kind`` that a ``config.json`` describes, on the meta device: shapes without values."""
    return _on_meta(kind, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=24)
def _on_meta(kind: str, config: str) -> nn.Module:
    content, model = json.loads(config), model_class(kind)
    with torch.device("meta"):
        if KINDS[kind].library == "diffusers":
            return model.from_config(content)  # type: ignore[no-any-return]
        if kind.startswith("CLIP"):  # some folders have the configuration of a whole CLIP
            content = content.get("text_config") or content
        return model(model.config_class.from_dict(content))  # type: ignore[no-any-return]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What files hold of a model, by name: its parameters, each once, and the buffers that are saved; not copied."""
    saved = module.state_dict(keep_vars=True)
    buffers = {name: value for name, value in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}
