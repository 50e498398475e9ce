from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from helpers import sample_latents
from lit_unlearn.data.images import load_image
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import encode_pictures, initial_noise
from lit_unlearn.methods.shared.reference_images import ReferenceImages

Build = Callable[..., ReferenceImages]


@pytest.fixture
def build(tiny_sd: Path, pets: str, tmp_path: Path) -> Build:
    def make(**arguments: Any) -> ReferenceImages:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 2}
        return ReferenceImages(**{**defaults, "image_cache": str(tmp_path / "references"), **arguments})

    return make


def attached(module: ReferenceImages, trainer: L.Trainer) -> ReferenceImages:
    module.configure_model()
    module.trainer = trainer
    return module


def picture(path: Path, color: str = "red", size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_images_are_drawn_by_the_unedited_model(build: Build, trainer_with: Any) -> None:
    module = attached(build(num_images=3, image_seed=9, concept=["dog", "cat"]), trainer_with())
    prompts = [["a dog", "the dog at sunset"], ["a cat"]]
    weight = module.pipeline.named_parameters()[module.edited_names[0]]
    with torch.no_grad():
        weight.add_(1.0)  # the edit has begun
    latents = module.reference_latents(prompts)
    with module.pretrained.restored(), torch.no_grad():
        states = [encode_prompts(module.pipeline.tokenizer, module.text_encoder, [p]) for p in ("a dog", "", "a cat")]
        noise = initial_noise(module.unet, [11, 100_011])
        arguments = (module.unet, module.pipeline.scheduler)
        for (number, row), state, start in zip([(0, 2), (1, 2)], (states[0], states[2]), noise, strict=True):
            alone = sample_latents(*arguments, state, states[1], start[None], 2, module.guidance_scale)[0]
            # Float32 in a batch of another size.
            torch.testing.assert_close(latents[number][row], alone, rtol=1e-3, atol=1e-4)
    assert [len(own) for own in latents] == [3, 3]
    count = module.forwards.count
    again = module.reference_latents(prompts)
    assert all(torch.equal(*pair) for pair in zip(latents, again, strict=True))
    assert module.forwards.count == count  # read from disk


def test_images_of_a_folder(build: Build, trainer_with: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    files = [picture(folder / "b.png", "blue", (16, 16)), picture(folder / "a.jpg", "green", (40, 20))]
    (folder / "notes.txt").write_text("not a picture, and not in the way", encoding="utf-8")
    module = attached(build(images=str(folder)), trainer_with())
    assert module.image_files == [sorted(files)]
    assert module.pipeline.picture_size == (16, 16)
    (latents,) = module.reference_latents([["a dog"]])
    expected = encode_pictures(module.vae, torch.stack([load_image(file, (16, 16)) for file in sorted(files)]))
    assert torch.equal(latents, expected)
    assert latents.shape == (2, 4, 8, 8)


def test_several_concepts_have_a_folder_each(build: Build, tmp_path: Path) -> None:
    files = [picture(tmp_path / "all" / "dog" / "1.png"), picture(tmp_path / "all" / "soccer_ball" / "1.png")]
    module = build(images=str(tmp_path / "all"), concept_set="emoji20", concept=["dog", "soccer ball"])
    assert module.image_files == [[file] for file in files]
    with pytest.raises(ValueError, match=r"model.images='.*/all/cat' is no folder"):
        build(images=str(tmp_path / "all"), concept_set="emoji20", concept=["dog", "cat"])


def damaged(path: Path) -> None:
    data = picture(path).read_bytes()
    path.write_bytes(data[: len(data) - 40])


@pytest.mark.parametrize(
    ("fill", "problem"),
    [
        (lambda folder: None, r"model.images='.*dogs' is no folder"),
        (lambda folder: folder.mkdir(), r"model.images='.*dogs' holds no picture"),
        (lambda folder: picture(folder / "x.png").rename(folder / "x.txt"), r"model.images='.*dogs' holds no picture"),
        (
            lambda folder: picture(folder / "x.png").write_text("no picture", encoding="utf-8"),
            r".*dogs/x\.png is no readable picture",
        ),
        (lambda folder: damaged(folder / "x.png"), r".*dogs/x\.png is no readable picture"),
    ],
    ids=["missing", "empty", "no pictures", "no picture", "damaged"],
)
def test_a_folder_that_cannot_be_read_is_refused_before_weights_are(
    fill: Callable[[Path], Any], problem: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("weights were loaded"))
    fill(tmp_path / "dogs")
    with pytest.raises(ValueError, match=problem):
        build(images=str(tmp_path / "dogs"))
