"""Edits whose stored settings are damaged: every command says in a sentence which file and which value is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import edit_content
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "a dog", "--ckpt_path", "EDIT", "-o", "a.png"],
    "test": ["test", "--config", "RECIPE", "--ckpt_path", "EDIT"],
    "export": ["export", "--ckpt_path", "EDIT", "-o", "out"],
    "attack": ["attack", "--ckpt_path", "EDIT", "--attacks", "noise_probe", "--output", "attacked"],
}


@pytest.fixture
def damaged(tiny_sd: Path, workplace: Path) -> Callable[..., Path]:
    """Writes the checkpoint of an edit of the dog with other arguments of its method, or other facts."""

    def write(arguments: dict[str, Any], **facts: Any) -> Path:
        known = {"concept_set": "emoji20", "num_inference_steps": 1, "guidance_scale": 4.0}
        content = edit_content(tiny_sd, lambda value: value + 0.5, arguments={**known, **arguments})
        content[CHECKPOINT_KEY] |= {"concept_set_sha256": load_concept_set("emoji20").sha256, **facts}
        torch.save(content, workplace / "edit.ckpt")
        return workplace / "edit.ckpt"

    return write


@pytest.mark.parametrize("command", COMMANDS)
def test_a_clip_skip_that_the_model_does_not_have(
    command: str, damaged: Callable[..., Path], recipe: Path, refuses: Callable[..., str]
) -> None:
    path = damaged({"clip_skip": 99})
    given = [{"EDIT": str(path), "RECIPE": str(recipe)}.get(word, word) for word in COMMANDS[command]]
    said = " ".join(refuses(*given).split())
    assert f"{path} stores clip_skip=99, which is impossible here (" in said
    assert "which has 3 layers, none to read after; possible is at most 2): the file is damaged, or its edit is" in said


@pytest.mark.parametrize(
    ("arguments", "facts", "message"),
    [
        ({"clip_skip": -1}, {}, "its clip_skip is -1, and possible is a whole number of at least 1, or none"),
        ({"clip_skip": "two"}, {}, "its clip_skip is 'two', and possible is"),
        ({"clip_skip": True}, {}, "its clip_skip is True, and possible is"),
        ({"num_inference_steps": 0}, {}, "its num_inference_steps is 0, not a whole number from 1 to 1000"),
        ({"num_inference_steps": 2.5}, {}, "its num_inference_steps is 2.5, not a whole number"),
        ({"num_inference_steps": None}, {}, "its num_inference_steps is None, not a whole number"),
        ({"guidance_scale": True}, {}, "its guidance_scale is True, not a number"),
        ({"guidance_scale": "4"}, {}, "its guidance_scale is '4', not a number"),
        ({"concept_set": 5}, {}, "its concept_set is not text"),
        ({"concept_set": ["pets"]}, {}, "its concept_set is not text"),
        ({"judge": ["emoji"]}, {}, "its judge is not text"),
        ({"judge_options": [1]}, {}, "its judge_options are no mapping"),
        ({}, {"model": ""}, "its model is not text"),
        ({}, {"model": "a\0b"}, "its model is not text"),
        ({}, {"concepts": "dog"}, "its concepts are no list of names"),
        ({}, {"concepts": ["\x1b[31mdog"]}, "its concepts are no list of names"),
        ({}, {"recipe": {"model": 5}}, "the model of its recipe is no mapping"),
    ],
)
def test_settings_of_the_wrong_kind(
    arguments: dict[str, Any], facts: dict[str, Any], message: str, damaged: Callable[..., Path]
) -> None:
    path = damaged(arguments, **facts)
    with pytest.raises(ValueError) as caught:
        read_edit(path)
    said = str(caught.value)
    assert said.startswith(f"ckpt_path={path} is no valid edit ({message}") and "the file is damaged or from" in said
    assert ("from another model" in said) == ("clip_skip" in arguments)


def test_a_family_without_clip_skip(damaged: Callable[..., Path], tiny_pixart: Path) -> None:
    edit = read_edit(damaged({"clip_skip": 1}))
    with pytest.raises(
        ValueError, match=r"stores clip_skip=1, .*PixArt.*; the model has no clip skip\): the file is dam"
    ):
        chosen_base(str(tiny_pixart), None, edit)


def test_an_attack_names_the_guidance_of_the_run(damaged: Callable[..., Path], refuses: Callable[..., str]) -> None:
    said = " ".join(
        refuses("attack", "--output", "attacked", "--ckpt_path", str(damaged({"guidance_scale": -3.0}))).split()
    )
    assert "guidance_scale=-3.0, that of the run, must be zero or larger" in said
