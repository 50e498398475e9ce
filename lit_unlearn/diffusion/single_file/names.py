"""Names of weights in diffusers, and the place of each in a file in the layout of the original code.

Some differ by more than spelling: attention layers of transformers and of OpenCLIP store queries, keys and values
as one tensor, and FLUX.1 stores the first layer of its FFN in the same tensor as well. A weight of diffusers is then a
range of rows. diffusers has functions for the way from a file to its own names, and none for the way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

Fraction = tuple[int, int, int]
"""Rows ``start / of`` to ``stop / of`` of a tensor, as (start, stop, of)."""
SWAPPED: tuple[Fraction, ...] = ((1, 2, 2), (0, 1, 2))
"""The halves in the other order: the original code has shift before scale, diffusers has scale before shift."""
THIRDS = {letter: ((number, number + 1, 3),) for number, letter in enumerate("qkv")}
SEVENTHS = {letter: ((number, number + 1, 7),) for number, letter in enumerate("qkv")}
"""Rows of ``linear1`` in FLUX.1: queries, keys and values, then the FFN, which is four times as wide as each."""
FFN: tuple[Fraction, ...] = ((3, 7, 7),)


@dataclass(frozen=True)
class Spot:
    """Where a weight is stored, without numbers of rows.

    Attributes:
        key: Name of the tensor in the file.
        fractions: The rows, in the order in which diffusers has them; empty for the whole tensor.
        transposed: Whether the file has the transposed matrix.
        convolution: Whether the file has a convolution of 1 by 1 in place of the linear layer.
        copies: Names of other tensors that hold the same.
    """

    key: str
    fractions: tuple[Fraction, ...] = ()
    transposed: bool = False
    convolution: bool = False
    copies: tuple[str, ...] = ()


Keys = frozenset[str]
Namer = Callable[[str, Keys], Spot | None]
"""Finds a weight by its name within its part; the keys of the part, without their prefix, settle what the names leave
open. None: there is no such weight in this layout."""


# --- text encoders


def clip(name: str, keys: Keys) -> Spot:
    """CLIP with the names of transformers."""
    return Spot(name if name.startswith("text_projection.") else "text_model." + name.removeprefix("text_model."))


def old_clip(name: str, keys: Keys) -> Spot:
    """CLIP in files of 2022 that leave ``text_model.`` out."""
    return Spot(name.removeprefix("text_model."))


def open_clip(name: str, keys: Keys) -> Spot | None:
    """CLIP with the names of OpenCLIP: queries, keys and values are one tensor, and the projection is transposed."""
    name = name.removeprefix("text_model.")
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    if name in fixed:
        return Spot(fixed[name])
    if name == "text_projection.weight":
        return Spot("text_projection", transposed=True)
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return None
    block, layer, kind = f"transformer.resblocks.{found[1]}", found[2], found[3]
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return Spot(f"{block}.attn.in_proj_{kind}", THIRDS[fused[1]])
    layers = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    return Spot(f"{block}.{layers[layer]}.{kind}") if layer in layers else None


def t5(name: str, keys: Keys) -> Spot:
    """T5 with the names of transformers; some files hold the embeddings of its tokens twice."""
    twice = name == "shared.weight" and "encoder.embed_tokens.weight" in keys
    return Spot(name, copies=("encoder.embed_tokens.weight",) if twice else ())


# --- the UNet and the autoencoder of latent diffusion


def unet(name: str, keys: Keys) -> Spot | None:
    """The UNet of Stable Diffusion 1, 2 and XL."""
    layer, _, kind = name.rpartition(".")
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if layer in fixed:
        return Spot(f"{fixed[layer]}.{kind}")
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
        return Spot(f"middle_block.1.{found[1]}")
    if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", name):
        return _resnet(f"middle_block.{2 * int(found[1])}", found[2])
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    side, number, what, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    # The original code counts all layers of a side in one row: those of a block, then the one that halves or doubles.
    size = _layers_per_block(keys) + 1
    if side == "down":
        block = f"input_blocks.{1 + number * size + (size - 1 if what == 'downsamplers' else index)}"
    else:
        block = f"output_blocks.{number * size + (size - 1 if what == 'upsamplers' else index)}"
    if what == "resnets":
        return _resnet(f"{block}.0", rest)
    if what == "attentions":
        return Spot(f"{block}.1.{rest}")
    if what == "downsamplers":
        return Spot(f"{block}.0.{rest.replace('conv', 'op', 1)}")
    return Spot(next((key for key in (f"{block}.2.{rest}", f"{block}.1.{rest}") if key in keys), f"{block}.2.{rest}"))


@lru_cache(maxsize=4)
def _layers_per_block(keys: Keys) -> int:
    """Number of layers in each block of the UNet: the layer after those of the first block halves the latents."""
    halving = [int(found[1]) for key in keys if (found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", key))]
    return min(halving) - 1 if halving else 2


def _resnet(block: str, rest: str) -> Spot | None:
    layers = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    layer, _, kind = rest.rpartition(".")
    return Spot(f"{block}.{layers[layer]}.{kind}") if layer in layers else None


def autoencoder(name: str, keys: Keys) -> Spot | None:
    """The autoencoder; the original code counts the decoder's blocks from the last one."""
    layer, _, kind = name.rpartition(".")
    if re.fullmatch(r"(encoder|decoder)\.conv_(in|out)|(post_)?quant_conv", layer):
        return Spot(name)
    if found := re.fullmatch(r"(encoder|decoder)\.conv_norm_out", layer):
        return Spot(f"{found[1]}.norm_out.{kind}")
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", name):
        rest = found[3].replace("conv_shortcut", "nin_shortcut")
        return Spot(f"{found[1]}.mid.block_{int(found[2]) + 1}.{rest}")
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", layer):
        layers = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        if found[2] not in layers:
            return None
        linear = found[2] != "group_norm" and kind == "weight"
        return Spot(f"{found[1]}.mid.attn_1.{layers[found[2]]}.{kind}", convolution=linear)
    found = re.fullmatch(
        r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if found is None:
        return None
    side, direction, number, what, index, rest = found[1], found[2], int(found[3]), found[4], found[5], found[6]
    if direction == "up":
        number = _last_block(keys) - number
    block = f"{side}.{direction}.{number}"
    if what == "resnets":
        return Spot(f"{block}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}")
    return Spot(f"{block}.{direction}sample.{rest}")


@lru_cache(maxsize=4)
def _last_block(keys: Keys) -> int:
    """Number of the last block of the autoencoder's decoder."""
    return max((int(up[1]) for key in keys if (up := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)


# --- transformers


def stable_diffusion_3(name: str, keys: Keys) -> Spot | None:
    """The transformer of Stable Diffusion 3 and 3.5."""
    if name == "pos_embed.pos_embed":
        return Spot("pos_embed")
    layer, _, kind = name.rpartition(".")
    fixed = {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
    }
    if layer in fixed:
        return Spot(f"{fixed[layer]}.{kind}")
    if layer == "norm_out.linear":
        return Spot(f"final_layer.adaLN_modulation.1.{kind}", SWAPPED)
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return None
    block, layer = f"joint_blocks.{found[1]}", found[2]
    if fused := re.fullmatch(r"(attn2?)\.to_([qkv])", layer):
        return Spot(f"{block}.x_block.{fused[1]}.qkv.{kind}", THIRDS[fused[2]])
    if fused := re.fullmatch(r"attn\.add_([qkv])_proj", layer):
        return Spot(f"{block}.context_block.attn.qkv.{kind}", THIRDS[fused[1]])
    if layer == "norm1_context.linear":
        # The last block does nothing with the text but hand it to the attention: it has a scale and a shift only.
        last = f"{block}.context_block.mlp.fc1.weight" not in keys
        return Spot(f"{block}.context_block.adaLN_modulation.1.{kind}", SWAPPED if last else ())
    layers = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    return Spot(f"{block}.{layers[layer]}.{kind}") if layer in layers else None


def flux(name: str, keys: Keys) -> Spot | None:
    """The transformer of FLUX.1."""
    layer, _, kind = name.rpartition(".")
    fixed = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    if layer in fixed:
        return Spot(f"{fixed[layer]}.{kind}")
    if layer == "norm_out.linear":
        return Spot(f"final_layer.adaLN_modulation.1.{kind}", SWAPPED)
    if found := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", layer):
        return _flux_single(f"single_blocks.{found[1]}", found[2], kind)
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return None
    block, layer = f"double_blocks.{found[1]}", found[2]
    if fused := re.fullmatch(r"attn\.to_([qkv])", layer):
        return Spot(f"{block}.img_attn.qkv.{kind}", THIRDS[fused[1]])
    if fused := re.fullmatch(r"attn\.add_([qkv])_proj", layer):
        return Spot(f"{block}.txt_attn.qkv.{kind}", THIRDS[fused[1]])
    norms = {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    }
    if layer in norms:
        return Spot(f"{block}.{norms[layer]}.scale")
    layers = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    return Spot(f"{block}.{layers[layer]}.{kind}") if layer in layers else None


def _flux_single(block: str, layer: str, kind: str) -> Spot | None:
    if fused := re.fullmatch(r"attn\.to_([qkv])", layer):
        return Spot(f"{block}.linear1.{kind}", SEVENTHS[fused[1]])
    if layer == "proj_mlp":
        return Spot(f"{block}.linear1.{kind}", FFN)
    if layer in ("attn.norm_q", "attn.norm_k"):
        return Spot(f"{block}.norm.{'query' if layer.endswith('q') else 'key'}_norm.scale")
    layers = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
    return Spot(f"{block}.{layers[layer]}.{kind}") if layer in layers else None
