"""The pictures of the unedited model that come with the embedded model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lit_unlearn import __version__
from lit_unlearn.callbacks.evaluation import UneditedPictures
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import Pictures
from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import EMBEDDED, resolve_model
from lit_unlearn.emoji.unedited import FILE, GUIDANCE, STEPS, main, pack, shipped_pictures
from lit_unlearn.methods.uce import UCE
from lit_unlearn.system.kept_pictures import save_kept

DRAWING = Drawing(
    "weights", {}, STEPS, GUIDANCE, "cpu", "AVX2", "torch.float32", None, "highest", False, {"torch": "3"}
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    for name, color in (("a", "red"), ("b", "blue")):
        save_kept(folder / f"{name}.png", Image.new("RGB", (3, 2), color), DRAWING.key)
    return folder


def test_pictures_come_back_by_their_names_under_their_key_alone(kept: Path, tmp_path: Path) -> None:
    file = tmp_path / FILE
    assert pack(kept, file, DRAWING) == 2
    found = shipped_pictures(DRAWING.key, file)
    assert sorted(found) == ["a", "b"]
    assert found["a"].shape == (3, 2, 3)
    assert found["a"][:, 0, 0].tolist() == [255, 0, 0]
    assert found["b"][:, 1, 2].tolist() == [0, 0, 255]
    assert shipped_pictures(replace(DRAWING, processor="AVX512").key, file) == {}
    assert shipped_pictures(DRAWING.key, tmp_path / "none") == {}


def test_what_cannot_be_packed(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="some that this version did not draw"):
        pack(kept, tmp_path / FILE, replace(DRAWING, guidance_scale=1.0))
    (kept / "a.png").rename(kept / "c.png")
    with pytest.raises(ValueError, match="it holds another picture"):
        pack(kept, tmp_path / FILE, DRAWING)
    assert not (tmp_path / FILE).exists()
    assert main([str(tmp_path / "none")]) == 2
    assert "none holds no pictures" in capsys.readouterr().err


def test_a_damaged_file_is_said_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_unlearn.emoji.unedited.rank_zero_info", said.append)
    (tmp_path / FILE).write_bytes(b"no tensors")
    assert shipped_pictures("any", tmp_path / FILE) == {}
    assert len(said) == 1
    assert f"{FILE} is damaged (" in said[0]


def test_they_are_of_this_version() -> None:
    """If this fails, make them anew: docs/emoji_sd.md."""
    with safe_open(Path(resolve_model(EMBEDDED), FILE), "pt") as file:
        notes = file.metadata()
    now = asdict(Drawing.of(load_pipeline(EMBEDDED), STEPS, GUIDANCE))
    then = json.loads(notes["drawing"])
    assert then.keys() == now.keys()
    # Other processors and libraries draw their own.
    assert {name for name in now if then[name] != now[name]} <= {"processor", "versions", "settings"}
    assert then["versions"]["lit_unlearn"] == __version__
    if (then["processor"], then["versions"]) == (now["processor"], now["versions"]):
        assert Drawing(**now).key == notes["key"]


@pytest.mark.slow
def test_they_are_what_the_embedded_model_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all pictures of a test of the shipped concept set, whatever it edits, but for the adversarial prompts."""
    with safe_open(Path(resolve_model(EMBEDDED), FILE), "pt") as file:
        key = file.metadata()["key"]
    shipped = shipped_pictures(key)
    module = UCE(concept="dog", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
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
    if Drawing.of(module.pipeline, STEPS, GUIDANCE).key == key:  # the same processor and libraries
        monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("a picture was drawn"))
        cache._key = None
        assert torch.equal(cache.unedited_pictures(module, some), known)
