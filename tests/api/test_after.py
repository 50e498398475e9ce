"""``attack`` and ``export`` do what the commands do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lit_unlearn as lu
from helpers import metadata
from lit_unlearn import cli
from lit_unlearn.attacks.ring_a_bell import RingABell


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that sees the concept on every picture, so that there is something to attack."""
    monkeypatch.setattr(
        "lit_unlearn.judges.classifier.ClassifierJudge.__call__",
        lambda self, images, questions: torch.ones(len(images)),
    )


def test_an_attack_is_that_of_the_command(edit: lu.Edit, seen: None) -> None:
    (found,) = lu.attack(edit, "ring_a_bell", num_pictures=2, settings={"ring_a_bell": {"steps": 3}}, device="cpu")
    assert (found.attack, found.concept, found.pictures, found.shown) == ("ring_a_bell", "dog", 2, 1.0)
    assert found.settings["steps"] == 3
    with pytest.raises(lu.UserError, match="has a result of ring_a_bell on dog: pass --overwrite"):
        lu.attack(edit, "ring_a_bell", num_pictures=2, steps=3)
    options = ["--ring_a_bell.steps", "3", "--num_pictures", "2", "--device", "cpu", "--output", "other"]
    assert cli.main(["attack", "--ckpt_path", str(edit.path), "--attacks", "ring_a_bell", *options]) == 0
    (by_command,) = json.loads(Path("other/attacks.json").read_text(encoding="utf-8"))["attacks"]
    assert (by_command["found"], by_command["settings"]) == (found.found, found.settings)
    own = RingABell(steps=2)
    (again,) = lu.attack(edit.path, own, num_pictures=2, overwrite=True, device="cpu")
    assert again.settings["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": "ring"}, "attacks='ring' is no attack"),
        ({"attacks": "noise_probe", "concepts": ["cat"]}, "concept='cat' was not edited"),
        ({"attacks": "noise_probe", "num_pictures": 0}, "num_pictures=0 must be at least 1"),
        ({"attacks": RingABell(), "steps": 5}, "steps=5 has no effect on attacks with settings of their own"),
        ({"attacks": "noise_probe", "settings": {"ring_a_bell": {"steps": 5}}}, "ring_a_bell is not among the attacks"),
    ],
)
def test_mistakes_in_attacks_are_told(arguments: dict[str, Any], message: str, edit: lu.Edit) -> None:
    with pytest.raises(lu.UserError, match=message):
        lu.attack(edit, **arguments)
    assert edit.folder is not None
    assert not (edit.folder / "attacks.json").exists()


def test_exports_are_those_of_the_command(edit: lu.Edit) -> None:
    own_names = {"format": "lora", "rank": 2, "lora_names": "diffusers"}
    for arguments, option in (
        ({"format": "delta"}, ["--delta"]),
        ({"format": "lora", "rank": 2}, ["--lora", "2"]),
        (own_names, ["--lora", "2", "--lora_names", "diffusers"]),
    ):
        path = lu.export(edit, "own.safetensors", overwrite=True, **arguments)  # type: ignore[arg-type]
        given = ["--ckpt_path", str(edit.path), "-o", "command.safetensors", *option, "--overwrite"]
        assert cli.main(["export", *given]) == 0
        own, command = load_file(path), load_file("command.safetensors")
        assert own.keys() == command.keys() != set()
        assert all(torch.equal(value, command[name]) for name, value in own.items())
        assert metadata(path) == metadata("command.safetensors")
    folder = lu.export(edit, "model")
    assert (folder / "model_index.json").is_file()
    assert lu.Pipeline.load(folder, device="cpu").parts.keys() == edit.pipeline(device="cpu").parts.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "logs"}, "output=logs exists"),
        ({"output": "x", "format": "zip"}, "format='zip' is not one of folder, delta, lora, single"),
        ({"output": "x", "dtype": "int8"}, "dtype='int8' is not one of float32"),
        ({"output": "x", "rank": 4}, "rank=4 is for LoRA weights"),
        ({"output": "x", "format": "lora", "rank": "most"}, "lora='most' must be a rank"),
        ({"output": "x", "format": "lora", "lora_names": "a1111"}, "lora_names='a1111' is not one of kohya, diffusers"),
        ({"output": "x", "format": "delta", "lora_names": "kohya"}, "lora_names=kohya is for LoRA weights"),
        ({"output": "x", "format": "delta", "names": "2022"}, "--names is for folders"),
        ({"output": "x", "names": "2021"}, "names='2021' is not known"),
        ({"output": "x", "format": "single", "dtype": "float16"}, "the copy has the types of the file"),
        ({"output": "x", "format": "single"}, "is no single file"),
        ({"output": "x", "single_file": "a.safetensors"}, "needs --format single"),
    ],
)
def test_mistakes_in_exports_are_told(arguments: dict[str, Any], message: str, edit: lu.Edit) -> None:
    with pytest.raises(lu.UserError, match=message):
        lu.export(edit, **arguments)
    assert not Path("x").exists()


def test_an_edit_is_found_by_its_folder_and_its_delta(edit: lu.Edit, tiny_sd: Path) -> None:
    assert edit.folder is not None
    by_folder = lu.Edit(edit.folder)
    delta = lu.Edit(lu.export(by_folder, "delta", format="delta"))
    assert (by_folder.path, delta.folder, delta.scores, delta.report) == (edit.path, None, None, {})
    assert repr(delta) == "Edit('delta/delta.safetensors'): UCE, dog"
    assert delta.weights.keys() == edit.weights.keys()
    with pytest.raises(lu.UserError, match="does not say where that lies"):
        delta.pipeline()
    assert delta.pipeline(tiny_sd, device="cpu").device.type == "cpu"
    Path("notes.ckpt").write_text("x", encoding="utf-8")
    with pytest.raises(lu.UserError, match=r"notes.ckpt is corrupt or no checkpoint"):
        lu.Edit("notes.ckpt")
