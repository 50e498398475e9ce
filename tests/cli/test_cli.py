"""Help before any heavy import, and one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import CONFIGS, files
from lit_unlearn import cli
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.methods.value_refinement import ValueRefinement


@pytest.mark.parametrize(
    "args",
    [
        *([], ["--help"], ["--version"], ["fti"]),
        *(["generate", "--help"], ["export", "--help"], ["attack", "--help"], ["demo", "--help"]),
    ],
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"import sys; from lit_unlearn.cli import main; main({args!r}); print(*sys.modules, file=sys.stderr)"
    before = os.times()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    after = os.times()
    # Of the processor: the clock on the wall counts busy neighbours as well.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.5
    assert not set(result.stderr.split()) & {"torch", "lightning", "jsonargparse", "diffusers", "transformers", "numpy"}
    assert "usage:" in result.stdout or args in (["--version"], ["fti"])


def test_help_names_commands_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for word in (
        "fit",
        "validate",
        "test",
        "predict",
        "generate",
        "export",
        "convert",
        "demo",
        "null_space.yaml",
        "emoji/judge.yaml",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--concept", "dgo"], "The concept set 'emoji20' has no concept 'dgo'; closest names: dog."),
        (["--concept", "[dog, dog]"], "concept=['dog', 'dog'] names a concept twice."),
        (["--config", "nul_space.yaml"], "There is no recipe 'nul_space.yaml' (closest: null_space.yaml)."),
        (["--trainer.max_epoch", "3"], "there is no option --trainer.max_epoch (closest: trainer.max_epochs)."),
        (["--model.runds", "3"], "model: ValueRefinement has no option 'runds' (closest: rounds)."),
        (["--model.rounds", "three"], "model.rounds: int expected, got three."),
        (["--model.rounds", "0"], "model.rounds=0 must be at least 1."),
        (["--data.steps", "0"], "data.steps=0 must be at least 1."),
        (
            ["--model", "ValueRefinment"],
            "model: there is no class or file 'ValueRefinment' (closest: ValueRefinement).",
        ),
        (["--data", "ClosedFormEdit"], "data: ClosedFormEdit is not of the kind that belongs here."),
        (["--edit", "NulSpace"], "edit: there is no class or file 'NulSpace' (closest: NullSpace)."),
        (["--edit.treshold", "1"], "edit: NullSpace has no option 'treshold' (closest: threshold)."),
        (["--trainer.callbacks+=JudgCurve"], "trainer.callbacks: there is no class or file 'JudgCurve'"),
        (
            ["--model.concept_set", "emoji21"],
            "There is no concept set 'emoji21'; the package has: emoji20, hundred, paper20.",
        ),
        (["--model.edited_parameters", "xyz"], "edited_parameters='xyz' selects no parameter"),
        (["--model.init_args.model", "nowhere"], "model='nowhere' is no folder and no hub id"),
        (["--trainer.accelerator", "abacus"], "You selected an invalid accelerator name"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist"),
        (["dog"], "'dog' is not expected: several values are one list in quotes, as in --concept '[dog, cat]'."),
    ],
)
def test_bad_input_of_a_fit(refuses: Callable[..., str], recipe: Path, args: list[str], message: str) -> None:
    assert refuses("fit", "--config", str(recipe), *args).startswith(message)


def test_a_recipe_that_edits_needs_a_concept(refuses: Callable[..., str], recipe: Path) -> None:
    content = {
        key: value for key, value in yaml.safe_load(recipe.read_text(encoding="utf-8")).items() if key != "concept"
    }
    Path("nameless.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert refuses("fit", "--config", "nameless.yaml") == "fit: name the concept to edit, e.g. --concept dog."


def test_bad_input_without_a_recipe(refuses: Callable[..., str]) -> None:
    assert refuses("fit") == "name a recipe that says what to run, e.g. --config null_space.yaml."
    assert refuses("fti") == "There is no command 'fti' (closest: fit)."
    assert refuses("xyz").startswith("There is no command 'xyz' (commands: fit, validate,")
    assert refuses("generate", "-o", "a.png").startswith("generate: the following arguments are required: PROMPT")
    assert refuses("export", "--ckpt_path", "a", "-o", "b", "--dtype", "int8").startswith("export: argument --dtype")


def test_a_corrupt_model_folder(refuses: Callable[..., str], recipe: Path, broken_model: Callable[..., Path]) -> None:
    folder = broken_model(lambda path: (path / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 99))
    message = refuses("fit", "--config", str(recipe), "--model.init_args.model", str(folder))
    assert "diffusion_pytorch_model.safetensors is corrupt" in message


def test_a_checkpoint_of_another_concept(refuses: Callable[..., str], run_folder: Path, recipe: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    message = refuses("test", "--config", str(recipe), "--concept", "cat", "--ckpt_path", ckpt_path)
    assert message == f"{ckpt_path} edits dog, but concept is cat: pass --concept dog."


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_checkpoint_that_unlearned_pictures(
    refuses: Callable[..., str], run_folder: Path, recipe: Path, command: str
) -> None:
    content = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    content[CHECKPOINT_KEY] |= {"concepts": [], "method": "SISS"}
    torch.save(content, "pictures.ckpt")
    message = refuses(command, "--config", str(recipe), "--ckpt_path", "pictures.ckpt")
    assert message == "pictures.ckpt edits no concept (SISS), but concept is dog: give the recipe of its own fit."


def test_a_checkpoint_of_a_concept_where_pictures_are_unlearned(refuses: Callable[..., str], run_folder: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    message = refuses("test", "--config", str(CONFIGS / "siss.yaml"), "--ckpt_path", ckpt_path)
    assert message == f"{ckpt_path} edits dog, but the recipe edits no concept: give the recipe of its own fit."


def test_a_checkpoint_of_another_base_model(
    refuses: Callable[..., str], run_folder: Path, recipe: Path, broken_model: Callable[..., Path]
) -> None:
    def change(folder: Path) -> None:
        path = folder / "text_encoder/model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("layers.2.mlp.fc2.weight"))
        weights[name][0, 0] += 1
        save_file(weights, path, metadata={"format": "pt"})

    ckpt_path, other = str(run_folder / "checkpoints/last.ckpt"), str(broken_model(change))
    message = refuses("test", "--config", str(recipe), "--ckpt_path", ckpt_path, "--model.init_args.model", other)
    assert f"does not fit model={other!r}" in message
    assert message == refuses("generate", "a dog", "-o", "a.png", "--ckpt_path", ckpt_path, "--model", other)
    assert message == refuses("export", "--output", "out", "--ckpt_path", ckpt_path, "--model", other)


def test_a_null_space_of_dimension_zero(workplace: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--edit.threshold", "1e-30", "--edit.minimum", "0", "--trainer.callbacks", "[]"]
    assert cli.main(["fit", "--config", str(recipe), *options]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("lit-unlearn: error: The null space is empty: rule='mean' with threshold=1e-30")
    assert not files(workplace)


def test_an_error_within_training_is_raised(
    workplace: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(ValueRefinement, "training_step", fail)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["fit", "--config", str(recipe)])


def test_an_interrupt_ends_with_130(
    workplace: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ValueRefinement, "training_step", interrupt)
    assert cli.main(["fit", "--config", str(recipe)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lit-unlearn: interrupted"
