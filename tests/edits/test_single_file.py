"""Edits are written into a copy in which every other byte is the same, and read back by diffusers' names."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import KV, LAYERS, header_of, normal
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.edits.single_file import SingleFile, read_tensor, write_edits

Maker = Callable[..., Path]
METADATA = {
    "modelspec.title": "Ein Hund, 犬",
    "modelspec.hash_sha256": "0x" + "1" * 64,
    "sshs_model_hash": "2" * 64,
    "sshs_legacy_hash": "3" * 8,
    "lit_unlearn.concepts": '["cat"]',
    "format": "pt",
}


@pytest.fixture(scope="module")
def source(single_file: Maker, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_sd`` as one file in float32; not to be written to."""
    return single_file(tiny_sd, tmp_path_factory.mktemp("single") / "model.safetensors", metadata=METADATA)


@pytest.fixture(scope="module")
def edits(tiny_sd: Path) -> dict[str, Tensor]:
    """New values of some weights of ``tiny_sd``."""
    parameters = load_pipeline(str(tiny_sd)).named_parameters()
    return {name: parameters[name].detach() + 0.1 for name in (*LAYERS, *KV)}


def test_only_the_edited_bytes_differ(source: Path, edits: dict[str, Tensor], tmp_path: Path) -> None:
    written = write_edits(source, edits, tmp_path / "out.safetensors", {"concepts": '["dog"]'})
    (before, old), (after, new) = header_of(source), header_of(tmp_path / "out.safetensors")
    before.pop("__metadata__")
    metadata = after.pop("__metadata__")
    assert list(before.items()) == list(after.items())  # the order too
    file = SingleFile(source)
    keys = {file.place(name).key for name in edits}
    changed = {number for number in range(len(old)) if old[number] != new[number]}
    assert len(old) == len(new)
    for key, entry in file.header.items():
        start, stop = entry["data_offsets"]
        assert any(number in changed for number in range(start, stop)) == (key in keys), key
    for name, value in edits.items():
        assert torch.equal(read_tensor(tmp_path / "out.safetensors", name), value)
    assert written.rounded == {}
    assert metadata["modelspec.title"] == METADATA["modelspec.title"]
    assert metadata["lit_unlearn.concepts"] == '["dog"]'
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(new).hexdigest()}"
    assert metadata["sshs_model_hash"] == hashlib.sha256(new).hexdigest()
    assert "sshs_legacy_hash" not in metadata
    assert set(written.dropped) == {"sshs_legacy_hash", "lit_unlearn.concepts"}
    assert set(written.remade) == {"modelspec.hash_sha256", "sshs_model_hash"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]  # no temporary file is left


def test_the_old_values_make_the_old_file(source: Path, tmp_path: Path) -> None:
    values = {name: read_tensor(source, name) for name in (*LAYERS, *KV)}
    write_edits(source, values, tmp_path / "out.safetensors", {})
    assert header_of(source)[1] == header_of(tmp_path / "out.safetensors")[1]


def test_the_file_is_that_of_its_pipeline(source: Path, tiny_sd: Path, tiny_sd2: Path) -> None:
    file = SingleFile(source)
    parameters = load_pipeline(str(tiny_sd)).named_parameters()
    assert (file.layout.family, set(file.parts)) == ("Stable Diffusion 1", {"unet", "text_encoder", "vae"})
    assert file.differing(parameters.items()) == []
    assert file.differing((name, value.half()) for name, value in parameters.items()) == []
    other = file.differing(load_pipeline(str(tiny_sd2)).named_parameters().items())
    assert set(LAYERS) | set(KV) <= set(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_file_is_kept_and_said(
    dtype: torch.dtype, single_file: Maker, edits: dict[str, Tensor], tiny_sd: Path, tmp_path: Path
) -> None:
    source = single_file(tiny_sd, tmp_path / "half.safetensors", dtype)
    written = write_edits(source, edits, tmp_path / "out.safetensors", {})
    name = str(dtype).removeprefix("torch.")
    assert written.rounded == {name: list(edits)}
    assert written.lines()[0] == f"{len(edits)} of the edited weights are rounded to {name}, which the file has them in"
    for edited, value in edits.items():
        assert torch.equal(read_tensor(tmp_path / "out.safetensors", edited), value.to(dtype))
    exact = {edited: value.to(dtype).float() for edited, value in edits.items()}
    assert write_edits(source, exact, tmp_path / "exact.safetensors", {}).lines() == []


def test_rows_of_a_fused_and_a_transposed_tensor(tmp_path: Path) -> None:
    prefix = "conditioner.embedders.1.model."
    tensors = {
        prefix + "token_embedding.weight": normal(5, 4, seed=0),
        prefix + "transformer.resblocks.0.attn.in_proj_weight": normal(12, 4, seed=1),
        prefix + "transformer.resblocks.0.attn.in_proj_bias": normal(12, seed=2),
        prefix + "text_projection": normal(4, 3, seed=3),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    edits = {
        f"{layer}.k_proj.weight": normal(4, 4, seed=4),
        f"{layer}.v_proj.bias": normal(4, seed=5),
        "text_encoder_2.text_projection.weight": normal(3, 4, seed=6),
    }
    write_edits(tmp_path / "in.safetensors", edits, tmp_path / "out.safetensors", {})
    found = load_file(tmp_path / "out.safetensors")
    weight, bias = (
        tensors[prefix + "transformer.resblocks.0.attn.in_proj_weight"].clone(),
        tensors[prefix + "transformer.resblocks.0.attn.in_proj_bias"].clone(),
    )
    weight[4:8], bias[8:12] = edits[f"{layer}.k_proj.weight"], edits[f"{layer}.v_proj.bias"]
    assert torch.equal(found[prefix + "transformer.resblocks.0.attn.in_proj_weight"], weight)
    assert torch.equal(found[prefix + "transformer.resblocks.0.attn.in_proj_bias"], bias)
    assert torch.equal(found[prefix + "text_projection"], edits["text_encoder_2.text_projection.weight"].T)
    assert torch.equal(found[prefix + "token_embedding.weight"], tensors[prefix + "token_embedding.weight"])
    for name, value in edits.items():
        assert torch.equal(read_tensor(tmp_path / "out.safetensors", name), value)


def test_swapped_halves(tmp_path: Path) -> None:
    tensors = {
        "joint_blocks.0.context_block.attn.qkv.weight": normal(6, 2),
        "final_layer.adaLN_modulation.1.weight": normal(4, 2, seed=1),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    name, value = "transformer.norm_out.linear.weight", normal(4, 2, seed=2)
    assert torch.equal(read_tensor(tmp_path / "in.safetensors", name), list(tensors.values())[1][[2, 3, 0, 1]])
    write_edits(tmp_path / "in.safetensors", {name: value}, tmp_path / "out.safetensors", {})
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")["final_layer.adaLN_modulation.1.weight"], value[[2, 3, 0, 1]]
    )


def test_the_same_weight_by_two_names_is_refused(source: Path, edits: dict[str, Tensor], tmp_path: Path) -> None:
    value = edits[LAYERS[0]]
    twice = {LAYERS[0]: value, LAYERS[0].replace("text_encoder.", "text_encoder.text_model."): value}
    with pytest.raises(ValueError, match="Two of the edited weights are the same one"):
        write_edits(source, twice, tmp_path / "out.safetensors", {})


def _set(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    value[0, 0] = number
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: _set(value, float("nan")), "holds numbers that are not finite: the edit has failed"),
        (lambda value: _set(value, float("inf")), "holds numbers that are not finite"),
        (lambda value: _set(value, 1e6), "too large for float16, which .* give a checkpoint in bfloat16 or float32"),
        (lambda value: value[1:], r"has the shape \(31, 128\) and .* has \(32, 128\) there"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    change: Callable[[Tensor], Tensor],
    message: str,
    single_file: Maker,
    edits: dict[str, Tensor],
    tiny_sd: Path,
    tmp_path: Path,
) -> None:
    source = single_file(tiny_sd, tmp_path / "half.safetensors", torch.float16)
    bad = {**edits, LAYERS[-1]: change(edits[LAYERS[-1]])}
    with pytest.raises(ValueError, match=message):
        write_edits(source, bad, tmp_path / "out.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["half.safetensors"]


def test_fp8_is_refused(source: Path, edits: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = load_file(source)
    key = SingleFile(source).place(LAYERS[0]).key
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(ValueError, match=rf"has '{key}' as F8_E4M3, which is too coarse for an edit: give the check"):
        write_edits(tmp_path / "fp8.safetensors", edits, tmp_path / "out.safetensors", {})


def test_what_exists_is_kept(source: Path, edits: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists: choose another name"):
        write_edits(source, edits, output, {})
    assert output.read_bytes() == b"mine"
    write_edits(source, edits, output, {}, overwrite=True)
    content = output.read_bytes()
    with pytest.raises(ValueError, match="exists: choose another name"):  # the source itself
        write_edits(output, edits, output, {}, overwrite=True)
    assert output.read_bytes() == content
    with pytest.raises(ValueError, match="There is nothing to write"):
        write_edits(source, {}, tmp_path / "none.safetensors", {})


def test_an_averaged_copy_is_named(single_file: Maker, edits: dict[str, Tensor], tiny_sd: Path, tmp_path: Path) -> None:
    more = {f"model_ema.diffusion_modelout2{kind}": torch.zeros(4) for kind in ("weight", "bias")}
    source = single_file(tiny_sd, tmp_path / "model.safetensors", **more)
    written = write_edits(source, edits, tmp_path / "a.safetensors", {})
    assert written.lines()[-1].startswith(
        "2 tensors model_ema.* are an averaged copy of the UNet that the edit does no"
    )
    text = {name: value for name, value in edits.items() if name in LAYERS}
    assert write_edits(source, text, tmp_path / "b.safetensors", {}).averaged == 0


def test_clip_without_its_prefix(single_file: Maker, edits: dict[str, Tensor], tiny_sd: Path, tmp_path: Path) -> None:
    source = single_file(
        tiny_sd, tmp_path / "model.safetensors", encoder=("cond_stage_model.transformer.", names.old_clip)
    )
    assert SingleFile(source).place(LAYERS[0]).key == "cond_stage_model.transformer.encoder.layers.1.mlp.fc2.weight"
    write_edits(source, edits, tmp_path / "out.safetensors", {})
    assert torch.equal(read_tensor(tmp_path / "out.safetensors", LAYERS[0]), edits[LAYERS[0]])


def test_metadata_is_made_where_there_is_none(source: Path, edits: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(load_file(source), tmp_path / "plain.safetensors")
    assert "__metadata__" not in header_of(tmp_path / "plain.safetensors")[0]
    write_edits(tmp_path / "plain.safetensors", edits, tmp_path / "out.safetensors", {"method": '"UCE"'})
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"lit_unlearn.method": '"UCE"'}


def test_a_large_tensor_is_copied_in_pieces(
    source: Path, edits: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_edits(source, edits, tmp_path / "a.safetensors", {})
    monkeypatch.setattr("lit_unlearn.edits.single_file.PIECE", 1000)
    write_edits(source, edits, tmp_path / "b.safetensors", {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    for name, content, message in (
        (
            "a.ckpt",
            b"PK",
            "is a pickle, which may hold code: convert it first, with `lit-unlearn convert a.ckpt -o a.s",
        ),
        ("a.gguf", b"GGUF....", "is a GGUF file, whose weights are too coarse"),
        ("a.safetensors", b"\x00" * 40, "is corrupt"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SingleFile(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist: give the checkpoint"):
        SingleFile(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder: give one file"):
        SingleFile(tmp_path)
    shutil.copy(source, cut := tmp_path / "cut.safetensors")
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 1)
    with pytest.raises(ValueError, match="is corrupt"):
        SingleFile(cut)
