"""``draw`` draws what ``generate`` draws; ``grid`` puts pictures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lit_unlearn as lu
from helpers import read_picture
from lit_unlearn import cli


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.array(first), np.array(second))


def test_pictures_are_those_of_generate(edit: lu.Edit, tiny_sd: Path) -> None:
    options = ["--seed", "3", "--scale", "2"]
    assert cli.main(["generate", "a dog", "-o", "edited.png", "--ckpt_path", str(edit.path), *options]) == 0
    edited = lu.draw(edit, "a dog", seed=3, scale=2)
    assert [picture.size for picture in edited] == [(32, 32)]
    assert same(edited[0], read_picture("edited.png"))
    steps = ["--model", str(tiny_sd), "--num_inference_steps", "2", "--guidance_scale", "2"]
    assert cli.main(["generate", "a dog", "-o", "plain.png", *steps, *options]) == 0
    pipeline = lu.Pipeline.load(tiny_sd, device="cpu")
    how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    assert same(lu.draw(pipeline, ["a dog"], seed=3, scale=2, **how)[0], read_picture("plain.png"))
    assert not same(read_picture("plain.png"), read_picture("edited.png"))
    assert same(lu.draw(edit.pipeline(device="cpu"), "a dog", seed=3, scale=2, **how)[0], edited[0])


def test_pictures_come_by_prompt_and_then_by_seed(edit: lu.Edit) -> None:
    pictures = lu.draw(edit, ["a dog", "a cat"], num=2, batch_size=3)
    assert len(pictures) == 4
    assert same(pictures[3], lu.draw(edit, "a cat", seed=1)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a dog", "num": 0}, "num=0 must be at least 1"),
        ({"prompts": "a dog", "scale": 0}, "scale=0 must be at least 1"),
        ({"prompts": "a dog", "num_inference_steps": 5000}, "num_inference_steps=5000 cannot be used"),
        ({"prompts": "a dog", "device": "cpu"}, "device and offload are for an edit"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str, tiny_sd: Path) -> None:
    with pytest.raises(lu.UserError, match=message):
        lu.draw(lu.Pipeline.load(tiny_sd, device="cpu"), **arguments)


def test_models_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(lu.UserError, match="nowhere"):
        lu.Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(lu.UserError, match="device='tpu' cannot be used here"):
        lu.Pipeline.load(device="tpu")


def test_grid() -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    made = lu.grid([[red, blue], [blue, red]], ["before", "after"], ["one", "two"])
    assert made.width > 2 * 128
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= {colour for _, colour in made.getcolors(10_000) or ()}
    for rows, labels, message in (
        ([], [], "no pictures"),
        ([[red], [Image.new("RGB", (8, 8))]], [], "pictures of the sizes"),
        ([[red]], ["a", "b"], "2 row labels for 1 rows"),
    ):
        with pytest.raises(lu.UserError, match=message):
            lu.grid(rows, labels)
