"""An export is what its provenance says, and what is not is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import LAYERS, edit_content
from lit_unlearn import cli
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.edits.verify import verify_export


@pytest.fixture(scope="session")
def exports(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``folder``, ``delta.safetensors`` and ``lora.safetensors`` of one edit; not to be written to."""
    root = tmp_path_factory.mktemp("exports")
    content = edit_content(tiny_sd, lambda value: value + 0.5, arguments={"concept_set": "emoji20"})  # of rank 1
    torch.save(content, root / "edit.ckpt")
    export = ["export", "--ckpt_path", str(root / "edit.ckpt"), "-o"]
    assert cli.main([*export, str(root / "folder")]) == 0
    assert cli.main([*export, str(root / "delta.safetensors"), "--delta"]) == 0
    assert cli.main([*export, str(root / "lora.safetensors"), "--lora", "auto"]) == 0
    return root


@pytest.fixture
def folder(exports: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder."""
    return Path(shutil.copytree(exports / "folder", tmp_path / "folder"))


def wrong(path: Path, base: Path | None = None) -> list[str]:
    return [
        line for finding in verify_export(path, BaseModel.find(str(base)) if base else None) for line in finding.wrong
    ]


@pytest.mark.parametrize("name", ["folder", "delta.safetensors", "lora.safetensors"])
def test_an_export_is_as_it_says(exports: Path, tiny_sd: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["verify", str(exports / name), "--base", str(tiny_sd)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"{exports / name}: as its provenance says"
    assert "base model" in out and "ok (3)" in out


def test_provenance_has_every_hash(exports: Path, tiny_sd: Path, tiny_sd_2022: Path) -> None:
    facts = json.loads((exports / "folder/provenance.json").read_text(encoding="utf-8"))
    assert facts["base_sha256"] == BaseModel.find(str(tiny_sd)).sha256(torch.float32)
    assert facts["base_sha256"] == WholeModel.loaded(load_pipeline(str(tiny_sd))).sha256()
    assert facts["base_sha256"] == BaseModel.find(str(tiny_sd_2022)).sha256(torch.float32)  # the weights, not the files
    assert facts["concept_set_sha256"] == load_concept_set("emoji20").sha256
    names = {p.relative_to(exports / "folder").as_posix() for p in (exports / "folder").rglob("*") if p.is_file()}
    assert set(facts["files"]) == names - {"provenance.json"}
    assert set(facts["weights_sha256"]) == set(LAYERS)
    assert read_edit(exports / "delta.safetensors").base_weights == facts["base_sha256"]


def test_only_harmless_files_leave(exports: Path) -> None:
    endings = {path.suffix for path in exports.rglob("*") if path.is_file() and path.suffix != ".ckpt"}
    assert endings <= {".safetensors", ".json", ".md", ".png", ".txt"}
    for path in exports.rglob("*.safetensors"):
        load_file(path)


def test_what_differs_is_named(folder: Path, exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scheduler/scheduler_config.json").unlink()
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    (folder / "unet/pytorch_model.bin").write_bytes(pickle.dumps("surprise"))
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs", encoding="utf-8")
    assert wrong(folder) == [
        "unet/pytorch_model.bin may hold code",
        "scheduler/scheduler_config.json is missing",
        "model_index.json has changed",
        "unexpected unet/pytorch_model.bin",
    ]
    assert cli.main(["verify", str(folder)]) == 1
    assert "1 of 2 checks failed" in capsys.readouterr().out.splitlines()[-1]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a file and keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_changed_weight_is_named(folder: Path, tiny_sd: Path) -> None:
    own = LAYERS[0].removeprefix("text_encoder.")
    rewrite(folder / "text_encoder/model.safetensors", lambda tensors: tensors[own].view(-1)[0].add_(1e-3))
    other = "encoder.layers.0.mlp.fc1.weight"
    rewrite(folder / "text_encoder/model.safetensors", lambda tensors: tensors[other].view(-1)[0].add_(1e-3))
    assert wrong(folder, tiny_sd) == [
        "text_encoder/model.safetensors has changed",
        f"{LAYERS[0]} has changed",
        f"text_encoder.{other} is not that of the base model",
    ]


def test_a_delta_with_another_value_or_name(exports: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exports / "delta.safetensors", tmp_path / "delta.safetensors"))
    rewrite(path, lambda tensors: tensors.update({LAYERS[0]: tensors[LAYERS[0]] + 1, "unet.extra": torch.ones(1)}))
    assert wrong(path) == [f"{LAYERS[0]} has changed", "unexpected unet.extra", "unexpected weight unet.extra"]
    rewrite(path, lambda tensors: tensors.pop(LAYERS[1]))
    assert f"{LAYERS[1]} is missing" in wrong(path)


def test_another_base_is_refused_though_its_edited_weights_are_equal(
    exports: Path, broken_model: Callable[..., Path]
) -> None:
    file = "vae/diffusion_pytorch_model.safetensors"
    other = broken_model(lambda path: rewrite(path / file, lambda tensors: tensors["quant_conv.bias"].add_(1)))
    edit = read_edit(exports / "delta.safetensors")
    with pytest.raises(ValueError, match=r"whose vae differs: use the model that it was made on"):
        edit.check_whole(BaseModel.find(str(other)))
    with pytest.raises(ValueError, match=r"whose vae differs"):
        edit.apply(load_pipeline(str(other)))
    # A checkpoint knows the weights that it edits only.
    read_edit(exports / "edit.ckpt").check_base(BaseModel.find(str(other)))
    read_edit(exports / "edit.ckpt").check_whole(BaseModel.find(str(other)))
    assert wrong(exports / "delta.safetensors", other) == [f"vae is not that of {edit.model:.100}"]
    assert "vae.quant_conv.bias is not that of the base model" in wrong(exports / "folder", other)


def test_links_and_paths_outside(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x", encoding="utf-8")
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    facts["files"]["../secret.txt"] = facts["files"][str(secret)] = "0"
    (folder / "provenance.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "LICENSE").symlink_to(secret)
    assert wrong(folder) == [
        "LICENSE is a symbolic link",
        "../secret.txt lies outside of the export",
        f"{secret} lies outside of the export",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"edited_weights": ["unet.x"], "weights_sha256": 1}']
)
def test_provenance_that_cannot_be_read(folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "provenance.json").write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"3", b"[" * 100_000, b"\xff"])
def test_an_index_that_cannot_be_read(folder: Path, tiny_sd: Path, content: bytes | None) -> None:
    path = folder / "model_index.json"
    path.unlink() if content is None else path.write_bytes(content)
    changed = "model_index.json is missing" if content is None else "model_index.json has changed"
    assert wrong(folder, tiny_sd) == [changed, "model_index.json cannot be read"]


def test_what_was_kept_must_be_a_list(folder: Path, tiny_sd: Path) -> None:
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    (folder / "provenance.json").write_text(json.dumps({**facts, "kept": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match="has no provenance with the files that are the base's own"):
        wrong(folder, tiny_sd)
    del facts["kept"]  # of an earlier version
    (folder / "provenance.json").write_text(json.dumps(facts), encoding="utf-8")
    assert wrong(folder, tiny_sd) == []


def test_what_is_no_export(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no export of lit-unlearn"):
        verify_export(tiny_sd)
    with pytest.raises(ValueError, match="nowhere does not exist: give a folder or file that `lit-unlearn export`"):
        verify_export(tmp_path / "nowhere")


def test_names_of_2022_are_the_same_export(
    exports: Path, tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--ckpt_path", str(exports / "edit.ckpt"), "-o", str(tmp_path / "old"), "--names", "2022"]
    assert cli.main(command) == 0
    old, new = (load_file(path / "text_encoder/model.safetensors") for path in (tmp_path / "old", exports / "folder"))
    assert set(old) == {f"text_model.{name}" for name in new}
    assert wrong(tmp_path / "old", tiny_sd) == []
    loaded = load_pipeline(str(tmp_path / "old")).named_parameters()
    assert all(torch.equal(value, loaded[f"text_encoder.{name}"]) for name, value in new.items())
    for form in (["--delta"], ["--lora", "auto"]):
        assert cli.main([*command, *form]) == 2
        assert "--names is for folders" in capsys.readouterr().err
    assert cli.main([*command[:-2], "--delta", "--lora", "auto"]) == 2
    assert "--delta cannot be combined with --lora" in capsys.readouterr().err
