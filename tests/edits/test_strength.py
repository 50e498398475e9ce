"""An edit's strength moves its weights along a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import LAYERS
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.edits.checkpoint import Edit
from lit_unlearn.edits.strength import AdjustableEdits, Drawer, scaled

CPU = torch.device("cpu")


@pytest.fixture
def edits(tiny_sd: Path) -> list[Edit]:
    """An edit of two layers, and one of the second of them."""
    parameters = load_pipeline(str(tiny_sd)).named_parameters()
    values = {name: parameters[name].detach().clone() for name in LAYERS}
    noise = torch.Generator().manual_seed(0)
    whole = {name: value + torch.randn(value.shape, generator=noise) for name, value in values.items()}
    first = Edit(Path("a.ckpt"), "UCE", ["dog"], str(tiny_sd), fingerprint(values), whole, {"dtype": "float32"})
    one = LAYERS[-1]
    part = {one: values[one] - 0.25}
    return [first, replace(first, weights=part, base_fingerprint=fingerprint({one: values[one]}), path=Path("b.ckpt"))]


def test_the_ends_are_exact() -> None:
    before, after = torch.tensor([0.1, 3e8]), torch.tensor([0.7, 1.0])
    assert torch.equal(scaled(before, after, 0), before)
    assert torch.equal(scaled(before, after, 1), after)  # before + (after - before) is not, in float32
    assert not torch.equal(before + (after - before), after)
    assert_close(scaled(before, after, 0.5), (before + after) / 2)
    assert_close(scaled(before, after, 2), 2 * after - before)


def test_one_model_takes_each_edit_at_any_strength_and_forgets_the_last(edits: list[Edit], tiny_sd: Path) -> None:
    unedited = {name: value.detach().clone() for name, value in load_pipeline(str(tiny_sd)).named_parameters().items()}
    model = AdjustableEdits(BaseModel.find(str(tiny_sd)), edits, CPU)

    def found() -> dict[str, torch.Tensor]:
        assert model.pipeline is not None
        return {name: value.detach().clone() for name, value in model.pipeline.named_parameters().items()}

    for number, strength in [(0, 1.0), (1, 1.0), (0, 0.5), (1, 2.0), (None, 1.0), (0, 0.0)]:
        model.take(number, strength)
        now = found()
        edited = {} if number is None else edits[number].weights
        for name, value in unedited.items():
            expected = value + strength * (edited[name] - value) if name in edited else value
            assert_close(now[name], expected, rtol=0, atol=1e-6 if name in edited else 0)
    assert all(torch.equal(value, unedited[name]) for name, value in found().items())


def test_edits_in_different_precisions_are_refused(edits: list[Edit], tiny_sd: Path) -> None:
    other = replace(edits[1], hyper_parameters={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"different precisions \(a.ckpt float32, b.ckpt bfloat16\)"):
        AdjustableEdits(BaseModel.find(str(tiny_sd)), [edits[0], other], CPU)


def test_unedited_pictures_are_drawn_once(edits: list[Edit], tiny_sd: Path) -> None:
    drawer = Drawer(AdjustableEdits(BaseModel.find(str(tiny_sd)), edits, CPU), 1, 1.0)
    assert drawer.edits.pipeline is not None
    drawn: list[int] = []
    drawer.edits.pipeline.denoiser.register_forward_pre_hook(lambda _, args: drawn.append(len(args[0])))
    before, after = drawer(0, "a dog", 1.0, 3, 2)
    assert (len(before), len(after), drawn) == (2, 2, [2, 2])
    assert before[0].tobytes() != after[0].tobytes()
    again, unmoved = drawer(1, "a dog", 0.0, 4, 2)  # seed 4 is known, seed 5 is new
    assert drawn == [2, 2, 1, 2]
    assert again[0].tobytes() == before[1].tobytes() == unmoved[0].tobytes()
    with pytest.raises(ValueError, match="The prompt is empty"):
        drawer(0, "  ", 1.0, 0, 1)
    with pytest.raises(ValueError, match="count=0"):
        drawer(0, "a dog", 1.0, 0, 0)
