"""Names of weights in LoRA files: kohya's, which diffusers, webui, Forge and ComfyUI all read, or diffusers' own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command checks its options before it imports PyTorch, which takes seconds
    from torch import Tensor

Naming = Literal["kohya", "diffusers"]
NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers")
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Parts whose LoRA weights the loaders of diffusers look for, beside the denoiser."""
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Layers of a CLIP for which diffusers reads LoRA weights; it drops those of its projection, and of all of a T5."""
DROPPED = "unet.add_embedding."
"""Layers of Stable Diffusion XL that diffusers drops without a word when it reads kohya's names."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
"""Layers of a text encoder that diffusers recognises by kohya's names only if an ``out_proj`` is in the file."""


@dataclass(frozen=True)
class LoraNames:
    """How the weights of one model are named in a LoRA file.

    Attributes:
        naming: ``kohya``, with an underscore in place of each dot, or ``diffusers``, as ``save_lora_weights`` writes.
        prefixes: Beginning of the names of each part for which LoRA weights are read.
    """

    naming: Naming
    prefixes: Mapping[str, str]

    @classmethod
    def of(cls, naming: Naming, parts: Collection[str]) -> LoraNames:
        """Names for a model of these ``parts``, such as ``unet`` and ``text_encoder``.

        The UNet has the same names in every family. The scripts of kohya name Stable Diffusion XL's in the layout of
        the original code (``lora_unet_input_blocks_4_1_...``). diffusers, webui, Forge and ComfyUI read both, but
        diffusers those of the layers outside of the blocks only lately, and it needs the model's configuration to count
        the blocks. Only the scripts that merge LoRA weights into a single file know no others.
        """
        if naming == "diffusers":
            # transformers 5 has dropped "text_model." from the names of a CLIP; diffusers reads both, older ones this
            texts = {part: f"{part}.text_model." for part in TEXT_ENCODERS}
            return cls(naming, {**{part: f"{part}." for part in DENOISERS}, **texts})
        if "unet" not in parts:
            return cls(naming, {})  # diffusers has no kohya names for Stable Diffusion 3, and others for FLUX.1
        numbers = ("1", "2") if "text_encoder_2" in parts else ("",)
        texts = {part: f"lora_te{number}_text_model_" for part, number in zip(TEXT_ENCODERS, numbers, strict=False)}
        return cls(naming, {"unet": "lora_unet_", **texts})

    def fits(self, name: str, value: Tensor) -> bool:
        """Whether diffusers reads a change of the weight ``name`` as LoRA: linear layers and convolutions."""
        layer, _, kind = name.rpartition(".")
        part = name.partition(".")[0]
        if kind != "weight" or value.dim() not in (2, 4) or part not in self.prefixes:
            return False
        if self.naming == "kohya" and name.startswith(DROPPED):
            return False
        return part in DENOISERS or layer.endswith(TEXT_LAYERS)

    def layer(self, name: str) -> str:
        """The name of a weight's layer, such as ``lora_te_text_model_encoder_layers_11_mlp_fc2``."""
        part, _, layer = name.removesuffix(".weight").partition(".")
        if part not in DENOISERS:
            layer = layer.removeprefix("text_model.")
        return self.prefixes[part] + (layer.replace(".", "_") if self.naming == "kohya" else layer)

    def ends(self, name: str) -> tuple[str, str, str | None]:
        """What follows the name of a weight's layer for its A, its B, and its alpha; diffusers' own have no alpha."""
        if self.naming == "kohya":
            return ".lora_down.weight", ".lora_up.weight", ".alpha"
        if name.partition(".")[0] in DENOISERS:
            return ".lora_A.weight", ".lora_B.weight", None
        # with the ends above, diffusers does not read a text encoder of which no attention layer is in the file
        return ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None

    def companions(self, names: Collection[str]) -> dict[str, str]:
        """Weights that must be in the file, unchanged, so that diffusers reads ``names``; and one of the same shape.

        The converter of diffusers recognises kohya's attention layers of a text encoder by an ``out_proj`` in the file.
        """
        found = {}
        for part in TEXT_ENCODERS if self.naming == "kohya" else ():
            text = [name.removesuffix(".weight") for name in names if name.startswith(f"{part}.")]
            attention = [layer for layer in text if layer.endswith(ATTENTION)]
            if attention and not any(layer.endswith(".out_proj") for layer in text):
                found[f"{attention[0].rpartition('.')[0]}.out_proj.weight"] = f"{attention[0]}.weight"
        return found


STABLE_DIFFUSION = LoraNames.of("kohya", ("unet", "text_encoder"))
"""Kohya's names for Stable Diffusion 1 and 2."""
