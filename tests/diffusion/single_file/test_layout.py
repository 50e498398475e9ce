"""Every weight of the published architectures has its place in the published files, and every row is a weight's."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lit_unlearn.diffusion.parts import KINDS, described_model, weights_of
from lit_unlearn.diffusion.single_file.architectures import architecture_of, architectures
from lit_unlearn.diffusion.single_file.file import SingleFile
from lit_unlearn.diffusion.single_file.layout import Layout

HERE = Path(__file__).parent
NAMES = {"sd15": "sd1", "sd2_text_encoder": "sd2"}
"""Names of the architectures that have other ones in the lists."""
FAMILIES = {
    "sd15": "Stable Diffusion 1",
    "sd2_text_encoder": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3_medium": "Stable Diffusion 3",
    "sd35_large": "Stable Diffusion 3",
    "flux1_dev": "FLUX.1",
}
NO_WEIGHTS = re.compile(
    r".*\.position_ids|.*\blogit_scale"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)"  # diffusers has 23 of 24 layers
    r"|model\.model_sampling\.sigmas"
)
"""Tensors in the published files that are no weights of diffusers' models."""
NOT_THERE = "text_encoder.text_projection.weight"
"""Stable Diffusion 3.5 has no such tensor, and diffusers takes the identity."""


@cache
def published(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file; where the source has names only, shapes that every split divides."""
    lists = json.loads(gzip.decompress((HERE / "key_lists.json.gz").read_bytes()))
    return {key: (42,) if shape is None else tuple(shape) for key, shape in lists[model].items()}


def parts_of(model: str) -> dict[str, dict[str, Any]]:
    """The configurations that are shipped for a list, of the parts in it."""
    known = {name: config for name, config in architectures()[NAMES.get(model, model)].items() if name[0] != "_"}
    left_out = {"scheduler", *{"sd35_large": ["text_encoder_3"], "sd2_text_encoder": ["unet", "vae"]}.get(model, [])}
    return {name: config for name, config in known.items() if name not in left_out}


@cache
def weights(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a published architecture, as diffusers and transformers have them."""
    found: dict[str, tuple[int, ...]] = {}
    for part, config in parts_of(model).items():
        module = described_model(config["_class"], {k: v for k, v in config.items() if k != "_class"})
        found |= {f"{part}.{name}": tuple(value.shape) for name, value in weights_of(module).items()}
    return found


@pytest.mark.parametrize("model", FAMILIES)
def test_every_weight_has_its_place_with_its_shape(model: str) -> None:
    layout = Layout(published(model), "it.safetensors")
    assert (layout.family, set(layout.parts)) == (FAMILIES[model], set(parts_of(model)))
    for name, shape in weights(model).items():
        if model == "sd35_large":
            if name != NOT_THERE:
                assert layout.place(name).key in published(model), name
        else:
            assert layout.place(name).shape == shape, name


@pytest.mark.parametrize("model", FAMILIES)
def test_every_row_of_a_file_is_of_one_weight(model: str) -> None:
    layout, taken = Layout(published(model), "it.safetensors"), defaultdict(list)
    for name in weights(model):
        if model == "sd35_large" and name == NOT_THERE:
            continue
        place = layout.place(name)
        taken[place.key] += place.rows
    for key, shape in published(model).items():
        if NO_WEIGHTS.fullmatch(key):
            continue
        ends = [0]
        for start, stop in sorted(taken[key]):
            assert start == ends[-1], key
            ends.append(stop)
        assert ends[-1] == shape[0], key
    assert set(taken) <= set(published(model))


@pytest.mark.parametrize(
    ("model", "pattern", "count"),
    [
        ("sd15", r"unet\..*attn2\.to_[kv]\.weight", 32),
        ("sd15", r"text_encoder\..*mlp\.fc2\.weight", 12),
        ("sdxl", r"unet\..*attn2\.to_[kv]\.weight", 140),
        ("sdxl", r"text_encoder(_2)?\..*mlp\.fc2\.weight", 44),
        ("sdxl", r"unet\.add_embedding\.linear_1\.weight", 1),
        ("sd3_medium", r"transformer\.context_embedder\.weight", 1),
        ("sd3_medium", r"transformer\..*attn\.add_[kv]_proj\.weight", 48),
        ("sd3_medium", r"transformer\.time_text_embed\.text_embedder\.linear_1\.weight", 1),
        ("sd3_medium", r"text_encoder_3\..*DenseReluDense\.wo\.weight", 24),
        ("flux1_dev", r"transformer\.context_embedder\.weight", 1),
        ("flux1_dev", r"transformer\.transformer_blocks\..*attn\.add_[kv]_proj\.weight", 38),
        ("flux1_dev", r"transformer\.single_transformer_blocks\..*attn\.to_[kv]\.weight", 76),
        ("flux1_dev", r"text_encoder_2\..*DenseReluDense\.wo\.weight", 24),
    ],
)
def test_the_weights_that_carry_text(model: str, pattern: str, count: int) -> None:
    names = [name for name in weights(model) if re.fullmatch(pattern, name)]
    assert len(names) == count
    assert len({(place.key, place.rows) for place in map(Layout(published(model), "").place, names)}) == count


def test_rows_of_fused_tensors() -> None:
    flux = Layout(published("flux1_dev"), "")
    place = flux.place("transformer.single_transformer_blocks.7.proj_mlp.weight")
    assert (place.key, place.rows) == ("model.diffusion_model.single_blocks.7.linear1.weight", ((9216, 21504),))
    place = flux.place("transformer.norm_out.linear.weight")
    assert place.rows == ((3072, 6144), (0, 3072))
    place = Layout(published("sd3_medium"), "").place("transformer.transformer_blocks.3.attn.add_v_proj.bias")
    assert (place.key, place.rows, place.shape) == (
        "model.diffusion_model.joint_blocks.3.context_block.attn.qkv.bias",
        ((3072, 4608),),
        (1536,),
    )
    place = Layout(published("sdxl"), "").place("text_encoder_2.text_projection.weight")
    assert (place.key, place.transposed) == ("conditioner.embedders.1.model.text_projection", True)


@pytest.mark.parametrize("model", ["sd15", "sd3_medium", "flux1_dev"])
def test_a_denoiser_alone_needs_no_prefix(model: str) -> None:
    prefix = "model.diffusion_model."
    alone = {key.removeprefix(prefix): shape for key, shape in published(model).items() if key.startswith(prefix)}
    layout = Layout(alone, "it.safetensors")
    part = "unet" if model == "sd15" else "transformer"
    assert layout.parts == (part,)
    for name, shape in weights(model).items():
        if name.startswith(f"{part}."):
            assert layout.place(name).shape == shape
    with pytest.raises(
        ValueError,
        match=rf"^it.safetensors holds the {part} alone, no text_encoder \(no cond_stage_model.*\), and the edit "
        r"changes text_encoder.x: give a checkpoint that holds its encoders, or export a folder or a delta.$",
    ):
        layout.place("text_encoder.x")


def test_a_file_without_t5() -> None:
    shapes = {key: shape for key, shape in published("sd3_medium").items() if "t5xxl" not in key}
    with pytest.raises(
        ValueError, match=r"holds no text_encoder_3 \(no text_encoders.t5xxl.\*\), and the edit changes"
    ):
        Layout(shapes, "it.safetensors").place("text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo.weight")


def test_the_embeddings_that_a_file_has_twice() -> None:
    shapes, prefix = published("sd3_medium"), "text_encoders.t5xxl.transformer."
    assert Layout(shapes, "").place("text_encoder_3.shared.weight").key == f"{prefix}shared.weight"
    copy = f"{prefix}encoder.embed_tokens.weight"
    twice = {**shapes, copy: (32128, 4096)}
    place = Layout(twice, "it.safetensors").place("text_encoder_3.shared.weight")
    assert (place.key, place.copies) == (f"{prefix}shared.weight", (copy,))


EMA = {"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (EMA, r"holds averaged weights alone \(model_ema.\*\)"),
        ({"lora_unet_mid_block_proj_in.lora_down.weight": (4, 320)}, "holds LoRA weights, no model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "one part of a model with diffusers' names"),
        ({"a.weight": (1,)}, r"is no checkpoint of Stable Diffusion 1, 2, XL, 3 or FLUX.1 .* \(it has 'a.weight'\)"),
        ({}, r"it is empty"),
        ({"unet.conv_in.weight": (1,)}, r"holds some weights by lit-unlearn's names, no model: an edit \(a delta\) is"),
        ({"double_blocks.0.txt_attn.qkv.weight": (9, 3)}, "is no checkpoint"),  # FLUX.2 and Chroma
    ],
)
def test_other_files_are_named(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^it.safetensors .*{message}"):
        Layout(shapes, "it.safetensors")


def test_a_file_with_the_averaged_unet_only() -> None:
    shapes = {key: shape for key, shape in published("sd15").items() if "diffusion_model" not in key}
    with pytest.raises(ValueError, match=r"holds the averaged weights of the UNet alone \(model_ema.\*, no model"):
        Layout({**shapes, **EMA}, "it.safetensors").place("unet.conv_in.weight")


def test_a_missing_tensor_and_an_unknown_weight_are_named() -> None:
    shapes = dict(published("sd15"))
    del shapes["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    layout = Layout(shapes, "it.safetensors")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(ValueError, match=r"has no 'model.diffusion_model.input_blocks.1.1.* belongs: give the whole"):
        layout.place(name)
    with pytest.raises(ValueError, match=r"has no single place for unet.nothing.weight in the layout of Stable"):
        layout.place("unet.nothing.weight")


def test_rows_that_do_not_divide() -> None:
    shapes = dict(published("flux1_dev"))
    shapes["model.diffusion_model.double_blocks.0.txt_attn.qkv.weight"] = (9217, 3072)
    with pytest.raises(ValueError, match=r"with 9217 rows, which do not divide into 3 parts as FLUX.1 does"):
        Layout(shapes, "it.safetensors").place("transformer.transformer_blocks.0.attn.add_k_proj.weight")


@pytest.mark.parametrize("model", sorted({*FAMILIES} - {"sd2_text_encoder"}))
def test_the_architecture_of_a_file_is_found(model: str, tmp_path: Path) -> None:
    file = SimpleNamespace(layout=Layout(published(model), "it.safetensors"))
    assert architecture_of(cast(SingleFile, file)) == NAMES.get(model, model)


def test_architectures_that_differ_in_one_mark() -> None:
    flux = {key: shape for key, shape in published("flux1_dev").items() if "guidance_in" not in key}
    assert architecture_of(cast(SingleFile, SimpleNamespace(layout=Layout(flux, "")))) == "flux1_schnell"
    medium = published("sd3_medium") | {"model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)}
    assert architecture_of(cast(SingleFile, SimpleNamespace(layout=Layout(medium, "")))) == "sd35_medium"


@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd3_medium", "flux1_dev"])
def test_no_tensor_of_a_published_file_is_unknown(model: str) -> None:
    layout, rest = Layout(published(model), "it.safetensors"), dict[str, list[str]]()
    for part, config in parts_of(model).items():
        names = [name.removeprefix(f"{part}.") for name in weights(model) if name.startswith(f"{part}.")]
        rest[part] = [
            key for key in layout.unclaimed(part, names) if not KINDS[config["_class"]].ignored.fullmatch(key)
        ]
    assert rest == {part: [] for part in rest}
    name = next(iter(weights(model)))
    part, _, first = name.partition(".")
    assert layout.unclaimed(part, [first])  # the others
