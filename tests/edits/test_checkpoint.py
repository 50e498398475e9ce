"""Edited weights are read without trust: what is missing, broken or foreign is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import LAYERS, edit_content
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.edits.checkpoint import load_edited, newest_checkpoint, read_edit, run_folder
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY


@pytest.fixture
def content(components: StableDiffusion, tiny_sd: Path) -> dict[str, Any]:
    """A checkpoint as a run writes it: two weights, one larger."""
    return edit_content(tiny_sd, lambda value: value + 1, arguments={"rounds": 1, "_instantiator": "x"})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "run" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(content, path)
        return path

    return write


def test_an_edit_is_read_and_applied(
    content: dict[str, Any], write: Callable[..., Path], tiny_sd: Path, components: StableDiffusion
) -> None:
    edit = read_edit(write(content))
    assert (edit.method, edit.concepts, edit.hyper_parameters) == (
        "ValueRefinement",
        ["dog"],
        {"rounds": 1, "dtype": "float32"},
    )
    assert edit.run_folder is not None and edit.run_folder.name == "run"
    base = BaseModel.find(str(tiny_sd))
    edit.check_base(base)
    edited, before = load_edited(base, edit).named_parameters(), components.named_parameters()
    assert [name for name in before if not torch.equal(before[name], edited[name])] == LAYERS
    assert all(torch.equal(edited[name], content["state_dict"][name]) for name in LAYERS)


def test_names_of_2022_are_the_same_model(
    content: dict[str, Any], write: Callable[..., Path], tiny_sd_2022: Path
) -> None:
    edit = read_edit(write(content))
    base = BaseModel.find(str(tiny_sd_2022))
    edit.check_base(base)
    load_edited(base, edit)


@pytest.mark.parametrize("name", ["model.fp16.safetensors"])
def test_other_variants_beside_the_weights_do_not_matter(
    content: dict[str, Any], write: Callable[..., Path], broken_model: Callable[..., Path], name: str
) -> None:
    values = {name.removeprefix("text_encoder."): torch.zeros(1) for name in LAYERS}
    folder = broken_model(lambda path: save_file(values, path / "text_encoder" / name))
    read_edit(write(content)).check_base(BaseModel.find(str(folder)))


def damage(position: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        place = int(len(data) * position)
        return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]

    return flip


@pytest.mark.parametrize(
    "change",
    [lambda data: b"", lambda data: b"garbage" * 100, lambda data: data[: len(data) // 2], damage(0.3), damage(0.5)],
    ids=["empty", "garbage", "cut short", "a flipped byte", "another"],
)
def test_a_damaged_file_is_named(
    content: dict[str, Any], write: Callable[..., Path], change: Callable[[bytes], bytes]
) -> None:
    path = write(content)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"last\.ckpt is corrupt or no checkpoint \(.+\): copy it again") as caught:
        read_edit(path)
    assert "\n" not in str(caught.value)


class Unwelcome:
    """What a checkpoint could run, if it were unpickled with trust."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(CHECKPOINT_KEY), "was not made by an edit of lit-unlearn"),
        (lambda content: content[CHECKPOINT_KEY].pop("base_fingerprint"), "was not made by an edit of lit-unlearn"),
        (lambda content: content["state_dict"].pop(LAYERS[0]), "was not made by an edit of lit-unlearn"),
        (lambda content: content.pop("state_dict"), "has no state_dict"),
        (lambda content: content.update(unwelcome=Unwelcome()), "is corrupt or no checkpoint"),
    ],
)
def test_a_foreign_file_is_refused(
    content: dict[str, Any],
    write: Callable[..., Path],
    change: Callable[[Any], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(content)
    with pytest.raises(ValueError, match=message):
        read_edit(write(content))
    assert "run" not in capsys.readouterr().out.split()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.ckpt does not exist"):
        read_edit(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        read_edit(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is a folder: give the file"):
        read_edit(tmp_path)


def test_another_model_is_refused(
    content: dict[str, Any], write: Callable[..., Path], tiny_sd: Path, components: StableDiffusion
) -> None:
    content[CHECKPOINT_KEY]["base_fingerprint"] = "another"
    edit = read_edit(write(content))
    with pytest.raises(ValueError, match="whose weights differ"):
        edit.check_base(BaseModel.find(str(tiny_sd)))
    with pytest.raises(ValueError, match="other weights than the loaded model"):
        edit.apply(components)
    with pytest.raises(ValueError, match="whose weights differ"):
        edit.check_base(BaseModel.find("someone/another-model"))


def test_weights_that_the_model_lacks(
    content: dict[str, Any], write: Callable[..., Path], components: StableDiffusion
) -> None:
    content["state_dict"][LAYERS[0]] = torch.zeros(3, 3)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.fc2\.weight of shape \(3, 3\), which the model does not have"
    ):
        read_edit(write(content)).apply(components)


def test_a_delta_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"method": json.dumps("lora")})
    with pytest.raises(ValueError, match=r"was not made by `lit-unlearn export --delta`: it lacks 'concepts'"):
        read_edit(path)
    path.write_bytes(b"\0" * 50)
    with pytest.raises(ValueError, match="is corrupt"):
        read_edit(path)


def test_the_folder_of_a_run() -> None:
    assert run_folder("logs/esd/dog/version_3/checkpoints/last.ckpt") == Path("logs/esd/dog/version_3")
    assert run_folder("downloads/last.ckpt") is None


def test_the_newest_run_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for version in (2, 9, 10):
        path = tmp_path / f"version_{version}" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "version_11").mkdir()  # interrupted before its first checkpoint
    assert newest_checkpoint(tmp_path) == tmp_path / "version_10" / "checkpoints" / "last.ckpt"
