"""``convert`` makes safetensors of a pickle's tensors, and runs nothing that a pickle asks for."""

from __future__ import annotations

import collections
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import metadata
from lit_unlearn import cli
from lit_unlearn.edits.convert import convert

TENSORS: dict[str, Tensor] = {
    "b.half": torch.arange(6).reshape(2, 3).half(),
    "a.ids": torch.arange(5),
    "c.turned": torch.arange(12.0).reshape(3, 4).T,
    "d.brain": torch.full((3,), 1.5, dtype=torch.bfloat16),
    "e.flag": torch.tensor([True, False, True]),
    "f.scalar": torch.tensor(3.0),
}


class Trap:
    """Writes a file if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('trapped', 'w').write('x')",)


def assert_converted(path: Path) -> None:
    found = load_file(path)
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("old_format", [False, True])
def test_tensors_are_written_as_they_are(old_format: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old_format)
    assert convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors").left_out == []
    assert_converted(tmp_path / "a.safetensors")
    assert metadata(str(tmp_path / "a.safetensors")) == {"format": "pt"}


def test_the_state_dict_is_taken_out_and_the_rest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"epoch": 3, "state_dict": collections.OrderedDict({**TENSORS, "note": "text"}), "global_step": 7}
    torch.save(content, tmp_path / "a.ckpt")
    assert cli.main(["convert", str(tmp_path / "a.ckpt"), "-o", str(tmp_path / "a.safetensors")]) == 0
    assert_converted(tmp_path / "a.safetensors")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("a.safetensors: 6 tensors of " + str(tmp_path / "a.ckpt"))
    assert said[1] == "left out, since they are no weights: epoch, global_step, note"


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("old_format", [False, True])
def test_an_object_is_named_and_not_made(
    inside: bool, old_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {**TENSORS, "x": Trap()}} if inside else {"callbacks": Trap(), "state_dict": TENSORS}
    torch.save(content, "a.ckpt", _use_new_zipfile_serialization=not old_format)
    assert cli.main(["convert", "a.ckpt", "-o", "a.safetensors"]) == 2
    assert "a.ckpt holds an object exec, which is code and no tensor" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_class_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "path": Path("a")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds an object pathlib[\w.]*\.\w*Path, which is code and no tensor"):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")


def test_what_exists_is_kept(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists: choose another name"):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, no weights by name"),
        ({"epoch": 1}, "holds no tensors: give the checkpoint of a model"),
        ({3: torch.zeros(1)}, "has a tensor under 3, which is no name"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "has 'a' as sparse_coo, which is not converted"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "has 'a' as complex64, which is not converted"),
    ],
)
def test_other_contents_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").rename(tmp_path / "b.ckpt")  # by its content
    (tmp_path / "c.ckpt").write_bytes(b"GGUF....")
    (tmp_path / "d.ckpt").write_bytes(b"no pickle")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "e.ckpt", "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    place = content.index(TENSORS["a.ids"].numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "g.ckpt").write_bytes(content)
    for name, message in (
        ("g.ckpt", r"is corrupt or no checkpoint \(.* is damaged\)|Bad CRC"),
        ("b.ckpt", "is a file of safetensors already"),
        ("c.ckpt", "is a GGUF file"),
        ("d.ckpt", "is corrupt or no checkpoint"),
        ("e.ckpt", r"is corrupt or no checkpoint \(it is compressed"),
        ("f.ckpt", "does not exist: give a .ckpt file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "out.safetensors")


def test_the_output_is_safetensors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "a.ckpt", "-o", "a.ckpt2"]) == 2
    assert "output=a.ckpt2 must end in .safetensors." in capsys.readouterr().err
