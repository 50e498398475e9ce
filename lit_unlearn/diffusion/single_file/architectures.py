"""The architectures of published models, which a single file does not describe, in ``architectures.json``.

Sources: the configurations of Stable Diffusion 3's encoders and of the autoencoders of XL, 3 and FLUX.1 are those in
``configs/`` of SD.Next (github.com/vladmandic/automatic at 6e01d510, e5a5f8a8 and 64a0d1ae); the transformers of 3.5
those in a loader of fp8 files by Tenstorrent (Apache-2.0); the others are what diffusers' conversion scripts build.
Every size is compared with the published lists of names and shapes in a test, except those of PixArt, which has no
single file: they serve a plan.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lit_unlearn.diffusion.single_file.file import SingleFile

HUB = {
    "sd1": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    "sd2": tuple(f"stabilityai/stable-diffusion-2{end}" for end in ("-1", "-1-base", "", "-base")),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sd3": (
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "flux": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
}
"""Models of the hub with the same tokenizers, by the beginning of the architecture's name."""
LAYERS_OF_LARGE = 38
"""Number of blocks of Stable Diffusion 3.5 large; medium has 24."""


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Class of the pipeline and configuration of each part with weights and of the sampler, by name of the model."""
    content: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("architectures.json").read_text(encoding="utf-8")
    )
    return content


def architecture_of(file: SingleFile) -> str:
    """Name of the architecture of a file, from the names of its tensors."""
    family, keys = file.layout.family, file.layout.shapes
    if family == "FLUX.1":
        return "flux1_dev" if any(key.endswith("guidance_in.in_layer.weight") for key in keys) else "flux1_schnell"
    if family == "Stable Diffusion 3":
        if any(f"joint_blocks.{LAYERS_OF_LARGE - 1}." in key for key in keys):
            return "sd35_large"
        return "sd35_medium" if any(".x_block.attn2.qkv." in key for key in keys) else "sd3_medium"
    return {"Stable Diffusion 1": "sd1", "Stable Diffusion 2": "sd2", "Stable Diffusion XL": "sdxl"}[family]


def hub_models(architecture: str) -> tuple[str, ...]:
    """Models of the hub with the tokenizers of an architecture."""
    return next(models for beginning, models in HUB.items() if architecture.startswith(beginning))
