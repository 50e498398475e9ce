"""Where an export is written: what a name says is what is made, and only an export is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_unlearn import cli
from lit_unlearn.edits.export import check_output, output_path

FORMS = {None: "a folder", "delta.safetensors": "a delta", "pytorch_lora_weights.safetensors": "LoRA weights"}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "a/model.safetensors", "x.ckpt", "x.zip", "x.PT", "x.bin", "x.tar.gz", "x.json", "x.gguf"],
)
def test_a_folder_is_not_called_like_a_file(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"is the name of a file, and a pipeline is written as a folder: name a folder"
    ):
        output_path(Path(name), None, False)
    assert not any(Path().iterdir())


@pytest.mark.parametrize("file_name", [name for name in FORMS if name])
@pytest.mark.parametrize("name", ["x.ckpt", "x.zip", "x.pt", "x.SAFETENSORS", "x.json"])
def test_weights_are_safetensors(name: str, file_name: str) -> None:
    with pytest.raises(ValueError, match=r"weights are written as .safetensors: name such a file, or a folder"):
        output_path(Path(name), file_name, False)


@pytest.mark.parametrize("name", ["out", "v1.5", "sd-1.4-without-dog", "a.b/c", "dog.without"])
def test_folders_may_have_dots(name: str) -> None:
    assert output_path(Path(name), None, False) == Path(name)
    assert output_path(Path(name), "delta.safetensors", False) == Path(name) / "delta.safetensors"
    assert output_path(Path(f"{name}.safetensors"), "delta.safetensors", False) == Path(f"{name}.safetensors")


@pytest.mark.parametrize("file_name", FORMS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(file_name: str | None, overwrite: bool) -> None:
    Path("thesis").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'?thesis'? (is a file|exists)"):
        output_path(Path("thesis"), file_name, overwrite)
    with pytest.raises(ValueError, match=r"'thesis' is a file where a folder should be, so name another folder"):
        output_path(Path("thesis/out"), file_name, overwrite)
    assert Path("thesis").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("file_name", FORMS)
def test_only_an_export_is_replaced(file_name: str | None) -> None:
    save_file({"weight": torch.ones(1)}, "mine.safetensors")
    Path("mine").mkdir()
    output = Path("mine.safetensors" if file_name else "mine")
    with pytest.raises(ValueError, match=r"but no export of lit-unlearn: remove it yourself if it may go"):
        output_path(output, file_name, True)
    Path("mine/provenance.json").touch()
    save_file({"weight": torch.ones(1)}, "mine.safetensors", {"lit_unlearn": '"0.1.0"'})
    assert output_path(output, file_name, True) == output


def test_a_folder_called_like_a_file_by_an_earlier_version_stays() -> None:
    Path("model.safetensors").mkdir()
    Path("model.safetensors/provenance.json").touch()
    with pytest.raises(ValueError, match="is a folder, and something else would be written"):
        check_output(Path("model.safetensors"), True)


def test_it_is_said_before_the_checkpoint_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.ckpt").touch()
    assert cli.main(["export", "--ckpt_path", "empty.ckpt", "-o", "model.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "lit-unlearn: error: output='model.safetensors' is the name of a file, and a pipeline is written as a folder: "
        "name a folder (--delta and --lora RANK write one .safetensors file)."
    )
