"""Names of weights in LoRA files: kohya's names, which diffusers, webui, Forge and ComfyUI can all read."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
"""Prefix of each part's names."""
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Layers of a text encoder for which loaders accept LoRA weights."""
DROPPED = "unet.add_embedding."
"""Layers of Stable Diffusion XL that diffusers drops without a word when it reads these names."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
"""Layers of a text encoder that diffusers recognises only if an ``out_proj`` is in the file."""


def fits_lora(name: str, value: Tensor) -> bool:
    """Whether loaders accept a change of the weight ``name`` as LoRA: linear layers and convolutions."""
    layer, _, kind = name.rpartition(".")
    part = name.partition(".")[0]
    if kind != "weight" or value.dim() not in (2, 4) or part not in PREFIXES or name.startswith(DROPPED):
        return False
    return part == "unet" or layer.endswith(TEXT_LAYERS)


def lora_name(name: str) -> str:
    """The name of a weight's layer, such as ``lora_te_text_model_encoder_layers_11_mlp_fc2``."""
    part, _, layer = name.removesuffix(".weight").partition(".")
    return PREFIXES[part] + layer.replace(".", "_")


def companion(names: Collection[str]) -> tuple[str, str] | None:
    """A weight that must be in the file, unchanged, so that diffusers reads the others; and one of them of its shape.

    The converter of diffusers recognises kohya's attention layers of a text encoder by an ``out_proj`` in the file.
    """
    text = [name for name in names if name.startswith("text_encoder.")]
    attention = [name for name in text if name.removesuffix(".weight").endswith(ATTENTION)]
    if not attention or any(name.endswith(".out_proj.weight") for name in text):
        return None
    return f"{attention[0].removesuffix('.weight').rpartition('.')[0]}.out_proj.weight", attention[0]
