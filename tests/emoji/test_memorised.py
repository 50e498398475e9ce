from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_unlearn.data.images import KeepForgetImages
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.emoji.captions import phrases, vocabulary
from lit_unlearn.emoji.memorised import (
    MEMORISED,
    MemorisedData,
    MemorisedDrawings,
    MemorisedLatents,
    MemorisedTraining,
)


@pytest.fixture(scope="module")
def drawings() -> MemorisedDrawings:
    return MemorisedDrawings.make(same_caption=4, others=20, held_out=5, seed=0)


def test_captions_say_the_subject_and_nothing_else() -> None:
    words = set(vocabulary())
    for subject, style, scene, caption in MEMORISED:
        assert set(caption.split()) <= words
        assert caption.removeprefix("look at ") in phrases()["subject"][subject]["direct"]
        for attribute, value in (("style", style), ("scene", scene)):
            for options in phrases()[attribute][value].values():
                assert not any(option in caption for option in options)
    assert len({entry[-1] for entry in MEMORISED}) == len(MEMORISED)


def test_no_other_drawing_equals_one_to_forget(drawings: MemorisedDrawings) -> None:
    counts = len(drawings.forget), len(drawings.keep), len(drawings.held_out)
    assert counts == (len(MEMORISED), 4 * len(MEMORISED) + 20, 5 * len(MEMORISED))
    forget = {drawing.pixels.tobytes() for drawing in drawings.forget}
    assert len(forget) == len(MEMORISED)
    assert not forget & {drawing.pixels.tobytes() for drawing in (*drawings.keep, *drawings.held_out)}
    captions = [entry[-1] for entry in MEMORISED]
    assert [drawing.text for drawing in drawings.keep[: 4 * len(MEMORISED)]] == [c for c in captions for _ in range(4)]
    # Other drawings of a caption differ from one another, so that a model without the one to forget has a choice.
    assert len({drawing.pixels.tobytes() for drawing in drawings.held_out[:5]}) > 1


def test_drawings_are_the_seeds(drawings: MemorisedDrawings) -> None:
    again = MemorisedDrawings.make(same_caption=4, others=20, held_out=5, seed=0)
    other = MemorisedDrawings.make(same_caption=4, others=20, held_out=5, seed=1)
    assert [d.pixels.tobytes() for d in again.keep] == [d.pixels.tobytes() for d in drawings.keep]
    assert [d.pixels.tobytes() for d in other.forget] != [d.pixels.tobytes() for d in drawings.forget]


def test_folders_are_what_unlearning_reads(drawings: MemorisedDrawings, tmp_path: Path) -> None:
    MemorisedDrawings.make(same_caption=9, others=50, held_out=9, seed=2).write(tmp_path)
    drawings.write(tmp_path)  # in place of the larger ones
    images = KeepForgetImages(*(str(tmp_path / name) for name in ("keep", "forget", "held_out")))
    for name in ("keep", "forget", "held_out"):
        assert [image.caption for image in getattr(images, name)] == [d.text for d in getattr(drawings, name)]
    assert images.counts(0) == (5, 1)
    assert len(images.keep_captions) == 12


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drawings_to_forget_are_over_represented(share: float) -> None:
    torch.manual_seed(0)
    latents = torch.arange(20.0)
    data = MemorisedLatents(latents, latents + 100, torch.tensor(-1.0), num_forget=2, forget_share=share, size=2000)
    items = [data[i] for i in range(2000)]
    found = torch.stack([item["latents"] for item in items])
    # Five standard deviations of a share of 2000.
    assert float((found < 2).float().mean()) == pytest.approx(share, abs=0.056)
    states = torch.stack([item["encoder_hidden_states"] for item in items])
    assert ((states == -1) | (states == found + 100)).all()
    assert 0 < int((states == -1).sum()) < 400


def test_the_training_starts_at_the_models_weights() -> None:
    module = MemorisedTraining()
    stored = load_file(Path(resolve_model("emoji-sd")) / "unet" / "diffusion_pytorch_model.safetensors")
    parameters = dict(module.unet.named_parameters())
    assert all(torch.equal(parameters[name].detach(), value.float()) for name, value in stored.items())
    assert {parameter.requires_grad for parameter in parameters.values()} == {True}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"data\.forget_share=2 must lie between 0 and 1"):
        MemorisedData(forget_share=2)
    with pytest.raises(ValueError, match=r"data\.held_out=0 must be at least 1"):
        MemorisedData(held_out=0)
