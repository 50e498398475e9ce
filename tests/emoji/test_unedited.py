"""The pictures of the unedited model that come with the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lit_unlearn.callbacks.evaluation import UneditedPictures
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import Pictures
from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.source import EMBEDDED, resolve_model
from lit_unlearn.emoji.unedited import FILE, main, pack, shipped_pictures
from lit_unlearn.methods.uce import UCE
from lit_unlearn.system.kept_pictures import save_kept


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    for name, color in (("a", "red"), ("b", "blue")):
        save_kept(folder / f"{name}.png", Image.new("RGB", (3, 2), color), "this way")
    return folder


def test_pictures_come_back_by_their_names_under_their_key_alone(kept: Path, tmp_path: Path) -> None:
    file = tmp_path / FILE
    assert pack(kept, file) == 2
    found = shipped_pictures("this way", file)
    assert sorted(found) == ["a", "b"]
    assert found["a"].shape == (3, 2, 3)
    assert found["a"][:, 0, 0].tolist() == [255, 0, 0]
    assert found["b"][:, 1, 2].tolist() == [0, 0, 255]
    assert shipped_pictures("another way", file) == {}
    assert shipped_pictures("this way", tmp_path / "none") == {}


def test_what_cannot_be_packed(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_kept(kept / "c.png", Image.new("RGB", (3, 2)), "another way")
    with pytest.raises(ValueError, match="pictures of 2 keys, not of one"):
        pack(kept, tmp_path / FILE)
    (kept / "a.png").rename(kept / "c.png")
    with pytest.raises(ValueError, match="it holds another picture"):
        pack(kept, tmp_path / FILE)
    assert not (tmp_path / FILE).exists()
    assert main([str(tmp_path / "none")]) == 2
    assert "none holds pictures of 0 keys" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"is damaged .*: install the package again"):
        shipped_pictures("any", tmp_path / FILE)


@pytest.mark.slow
def test_they_are_what_the_embedded_model_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all pictures of a test of the shipped concept set, whatever it edits, but for the adversarial prompts."""
    with safe_open(Path(resolve_model(EMBEDDED), FILE), "pt") as file:
        key = file.metadata()["key"]
    shipped = shipped_pictures(key)
    module = UCE(concept="dog", num_inference_steps=8, guidance_scale=4.0)
    module.configure_model()
    cache = UneditedPictures(str(tmp_path))
    cache._key = key
    items = Pictures(load_concept_set("emoji20"), 2, 0).items
    assert {cache._path(module, item).stem for item in items} <= set(shipped)

    some = items[::25]
    drawn = module.generate([item.prompt for item in some], [item.seed for item in some])
    known = torch.stack([shipped[cache._path(module, item).stem] for item in some])
    off = (drawn.int() - known.int()).abs()
    assert off.max() <= 2
    assert (off > 0).float().mean() < 0.01
    if Drawing.of(module.pipeline, 8, 4.0).key == key:  # the same processor and libraries
        monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("a picture was drawn"))
        cache._key = None
        assert torch.equal(cache.unedited_pictures(module, some), known)
