from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lit_unlearn.diffusion.source import chosen_weights, read_config, resolve_model, weight_files

STEM = "diffusion_pytorch_model"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "sd").mkdir()
    assert resolve_model("~/sd") == tmp_path / "sd"
    with pytest.raises(ValueError, match="is no folder and no hub id"):
        resolve_model("~/other")


@pytest.mark.parametrize("name", ["models/sd.safetensors", "sd.ckpt", "models/a.bin", "a/b/c.gguf", "x/SD.SAFETENSORS"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_single_file_is_never_a_hub_id(
    name: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if exists:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    what = "names a single file, which does not exist"
    if exists:
        made, ending = f"{Path(name).stem}.safetensors", Path(name).suffix.lower()
        what = {
            ".safetensors": "is a single file: give the folder of a model",
            ".gguf": "is a GGUF file, whose weights are too coarse for an edit",
        }.get(ending, rf"is a pickle, .* convert {Path(name).name} -o {made}`, and give {made}")
    with pytest.raises(ValueError, match=what):
        resolve_model(name)
    if exists and name.lower().endswith(".safetensors"):
        assert resolve_model(name, single_file=True) == Path(name)
    else:
        with pytest.raises(ValueError, match=what):
            resolve_model(name, single_file=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("https://huggingface.co/owner/name", "give its id, 'owner/name'"),
        ("huggingface.co/owner/name/", "give its id, 'owner/name'"),
        ("https://huggingface.co/owner/name/resolve/main/sd.safetensors", "is a URL: download the model, as a folder"),
        ("https://example.org/model", "is a URL: download the model"),
        ("", "is no folder and no hub id"),
        ("owner/na--me", "is no folder and no hub id"),
        ("owner/name.git", "is no folder and no hub id"),
        ("owner/my model", "is no folder and no hub id"),
        ("owner/" + "n" * 300, "is no folder and no hub id"),
        ("$HOME/sd", "is no folder and no hub id"),
    ],
)
def test_what_cannot_be_a_hub_id_is_said_at_once(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_model(model)


def test_other_files_and_dead_links_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sd").mkdir()
    Path("sd/model_index.json").touch()
    with pytest.raises(ValueError, match="is a file: give one of safetensors, or the folder"):
        resolve_model("sd/model_index.json")
    Path("sd/link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is a link to nowhere, which does not exist"):
        resolve_model("sd/link")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"{STEM}.safetensors"], (None, f"{STEM}.safetensors")),
        ([f"{STEM}.bf16.safetensors"], ("bf16", f"{STEM}.bf16.safetensors")),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.safetensors"], (None, f"{STEM}.safetensors")),
        (
            [f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00001.safetensors"],
            (None, f"{STEM}.safetensors.index.json"),
        ),
        (
            [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"],
            ("fp16", f"{STEM}.safetensors.index.fp16.json"),
        ),
        (["model.safetensors", f"{STEM}.bin", "config.json"], None),
        ([], None),
    ],
)
def test_the_plain_weights_or_else_the_only_variant(names: list[str], expected: tuple[str | None, str] | None) -> None:
    assert chosen_weights("unet", names, "unet") == expected


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], "several variants .*bf16.safetensors, .*fp16"),
        ([f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"], "remove the one that is not to be used"),
    ],
)
def test_weights_that_could_be_either_are_refused(names: Sequence[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chosen_weights("unet", names, "unet")


@pytest.mark.parametrize("name", ["gone.safetensors", "../elsewhere.safetensors"])
def test_a_shard_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "elsewhere.safetensors").touch()
    index = tmp_path / f"unet/{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"lists '{name}', which is not in its folder"):
        weight_files(tmp_path, "unet")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "has no mapping"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-LFS: run `git lfs pull`"),
    ],
)
def test_a_broken_configuration_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json {reason}"):
        read_config(tmp_path / "config.json")
