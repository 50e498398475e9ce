"""``--base_edit`` and ``undo``: edits on top of edits, and without one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from helpers import CONFIGS
from lit_unlearn import cli
from lit_unlearn.edits.checkpoint import Edit, read_edit

CHECKPOINT = Path("checkpoints", "last.ckpt")
OWL = Path("logs/null_space/dog+owl/version_0")


def run(*args: str) -> None:
    assert cli.main(list(args)) == 0


def edit_in(folder: Path | str) -> Edit:
    return read_edit(Path(folder) / CHECKPOINT)


@pytest.fixture
def owl(run_folder: Path, recipe: Path) -> Path:
    """A run on top of the finished one."""
    run("fit", "--config", str(recipe), "--concept", "owl", "--base_edit", str(run_folder))
    return OWL


def test_it_edits_the_edited_model(run_folder: Path, recipe: Path) -> None:
    """The same weights, bit for bit, as a fit on a folder with the edited model."""
    both = ["--concept", "owl", "--model.repair_pairs", "false"]
    run("fit", "--config", str(recipe), *both, "--base_edit", str(run_folder))
    run("export", "--ckpt_path", str(run_folder), "-o", "edited")
    run("fit", "--config", str(recipe), *both, "--model.model", "edited")
    on_top, on_folder, alone = edit_in(OWL), edit_in("logs/null_space/owl/version_0"), edit_in(run_folder)
    assert on_top.concepts == ["dog", "owl"]
    assert on_top.base_fingerprint == alone.base_fingerprint != on_folder.base_fingerprint
    for name, weight in on_folder.weights.items():
        assert torch.equal(on_top.weights[name], weight)
        assert not torch.equal(alone.weights[name], weight)
    dog, own = on_top.chain
    assert (dog.concepts, own.concepts, own.names) == (["dog"], ["owl"], list(on_folder.weights))
    assert on_top.overwritten.keys() == {f"1/{name}" for name in alone.weights}


def test_a_delta_in_half_precision_is_started_from_as_it_is(
    run_folder: Path, recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("export", "--ckpt_path", str(run_folder), "--delta", "--dtype", "float16", "-o", "half.safetensors")
    run("fit", "--config", str(recipe), "--concept", "cat", "--base_edit", "half.safetensors")
    edit, half = edit_in("logs/null_space/dog+cat/version_0"), read_edit("half.safetensors")
    assert all(torch.equal(edit.overwritten[f"1/{name}"], value.float()) for name, value in half.weights.items())
    # A dog has become a cat, and cats go.
    assert "may have made it what goes now (cat): dog" in caplog.text
    assert edit.chain[1].again == ["dog"]


def test_scores_are_against_the_base_model_and_say_what_comes_back(owl: Path, recipe: Path) -> None:
    run("test", "--config", str(recipe), "--concept", "owl", "--ckpt_path", str(owl))
    scores = json.loads((owl / "scores.json").read_text(encoding="utf-8"))
    assert scores["edited"] == ["dog", "owl"]
    assert scores["relapse"]["concepts"] == ["dog"]
    run("test", "--config", str(recipe), "--concept", "dog", "--ckpt_path", "logs/null_space/dog/version_0")
    alone = json.loads(Path("logs/null_space/dog/version_0/scores.json").read_text(encoding="utf-8"))
    shares = [{n: c["share_with_concept"] for n, c in s["before"]["per_concept"].items()} for s in (scores, alone)]
    assert shares[0] == shares[1]
    changed = [s["edit"]["weight_change_norm"] for s in (scores, alone)]
    assert changed[0] > changed[1]  # that of both edits


def test_the_stored_recipe_fits_and_tests_again(owl: Path, recipe: Path) -> None:
    stored = yaml.safe_load((owl / "config.yaml").read_text(encoding="utf-8"))
    assert stored["base_edit"] == ["logs/null_space/dog/version_0/checkpoints/last.ckpt"]
    assert (stored["concept"], stored["model"]["init_args"]["retain_earlier"]) == (["dog", "owl"], True)
    run("fit", "--config", str(owl / "config.yaml"), "--fresh")
    again = edit_in(OWL.with_name("version_1"))
    assert all(torch.equal(again.weights[name], value) for name, value in edit_in(owl).weights.items())
    run("test", "--config", str(owl / "config.yaml"), "--ckpt_path", str(owl))


def test_other_methods_write_other_weights_and_either_can_be_taken_out(
    owl: Path, recipe: Path, run_folder: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config", "uce.yaml", "--model", str(tiny_sd), "--model.judge", str(recipe.parent / "judge")]
    run("fit", *args, "--concept", "cat", "--base_edit", str(owl))
    third = Path("logs/uce/dog+owl+cat/version_0")
    edit = edit_in(third)
    assert [link.method for link in edit.chain] == ["ValueRefinement", "ValueRefinement", "UCE"]
    assert all(torch.equal(edit.weights[name], value) for name, value in edit_in(owl).weights.items())
    capsys.readouterr()
    run("undo", "--ckpt_path", str(third))
    assert capsys.readouterr().out.splitlines()[:3] == [
        "1  dog (ValueRefinement)",
        "2  owl (ValueRefinement)",
        "3  cat (UCE)",
    ]
    run("export", "--ckpt_path", str(third), "--delta", "-o", "all.safetensors")
    model = ["--model", str(tiny_sd)]
    run("undo", "--ckpt_path", "all.safetensors", "--edit", "cat", "-o", "dog_owl.safetensors", *model)
    run("undo", "--ckpt_path", "dog_owl.safetensors", "--edit", "2", "-o", "dog.safetensors", *model)
    run("undo", "--ckpt_path", str(third), "--edit", "owl", "-o", "dog_cat.safetensors")
    run("verify", "dog_cat.safetensors", "--base", str(tiny_sd))
    dog, alone, dog_cat = read_edit("dog.safetensors"), edit_in(run_folder), read_edit("dog_cat.safetensors")
    assert dog.base_fingerprint == alone.base_fingerprint and dog.concepts == ["dog"]
    assert all(torch.equal(dog.weights[name], value) for name, value in alone.weights.items())
    assert dog_cat.concepts == ["dog", "cat"]
    assert all(torch.equal(dog_cat.weights[name], value) for name, value in alone.weights.items())
    assert {name for link in dog_cat.chain for name in link.names} == set(dog_cat.weights)


def test_one_that_is_under_another_is_refused(owl: Path, refuses: Callable[..., str]) -> None:
    said = refuses("undo", "--ckpt_path", str(owl), "--edit", "dog", "-o", "x.safetensors")
    assert "edit 2, owl (ValueRefinement), started from its" in said and not Path("x.safetensors").exists()
    said = refuses("undo", "--ckpt_path", str(owl), "--edit", "cat", "-o", "x.safetensors")
    assert said == (
        "edit='cat' is not there: give the number or a concept of one (1 dog (ValueRefinement); "
        "2 owl (ValueRefinement))."
    )
    said = refuses("undo", "--ckpt_path", str(owl), "-o", "x.safetensors")
    assert said == "undo: name the edit to take out with --edit, for output=x.safetensors."
    assert refuses("undo", "--ckpt_path", str(owl), "--edit", "2") == "undo: name the delta to write with --output."
    assert "does not exist" in refuses("undo", "--ckpt_path", "nothing.safetensors")


def test_a_method_without_retained_prompts_says_so_and_goes_on(
    run_folder: Path, esd: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*esd, "--concept", "castle", "--base_edit", str(run_folder)]
    run(*args)
    said = " ".join(capsys.readouterr().err.split())
    assert "ESD retains no prompt of dog here, so nothing holds the earlier edit" in said
    run(*args[: args.index("--trainer.max_steps")], *args[-4:], "--ckpt_path", "last")
    edit = edit_in("logs/esd/dog+castle/version_0")
    assert [link.concepts for link in edit.chain] == [["dog"], ["castle"]]
    assert all(torch.equal(edit.weights[name], value) for name, value in edit_in(run_folder).weights.items())


@pytest.fixture
def esd(recipe: Path, tiny_sd: Path) -> list[str]:
    """A fit of two steps that is stopped after one."""
    judge = str(recipe.parent / "judge")
    args = ["fit", "--config", str(CONFIGS / "esd.yaml"), "--model", str(tiny_sd), "--model.judge", judge]
    args += ["--model.num_chain_steps", "2", "--data.steps", "1", "--trainer.max_epochs", "2"]
    return [*args, "--trainer.max_steps", "1"]


def test_to_go_on_the_same_edits_are_needed(
    run_folder: Path, recipe: Path, esd: list[str], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    base_edit = ["--base_edit", "dog.safetensors"]
    run("export", "--ckpt_path", str(run_folder), "--delta", "-o", "dog.safetensors")
    run(*esd, "--concept", "cat", *base_edit)
    run("fit", "--config", str(recipe), "--concept", "dog", "--model.first_layer", "-1")
    run("export", "--ckpt_path", "logs/null_space/dog/version_1", "--delta", "-o", "dog.safetensors", "--overwrite")
    capsys.readouterr()
    run(*esd, "--concept", "cat", *base_edit, "--once")
    assert "nothing to do" not in capsys.readouterr().out  # the same command, with another edit in the file
    edits = [edit_in(f"logs/esd/dog+cat/version_{number}") for number in (0, 1)]
    assert [len(edit.chain[0].names) for edit in edits] == [2, 1]
    refuses: Callable[..., str] = request.getfixturevalue("refuses")
    on = f"fit: {edits[0].path} was made on top of dog (ValueRefinement)"
    for concept in ("cat", "[dog, cat]"):
        said = refuses(*esd, "--concept", concept, "--ckpt_path", str(edits[0].path))
        assert said == f"{on}: to go on with it, give the --base_edit of its fit."
    said = refuses(*esd, "--concept", "cat", *base_edit, "--ckpt_path", str(edits[0].path))
    assert said.startswith(f"{on}, and base_edit=dog.safetensors is something else")


def test_what_is_left_as_it_is_follows_from_what_a_fit_starts_from(
    run_folder: Path, recipe: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", str(recipe), "--concept", "[dog, owl]"]
    run(*fit, "--base_edit", str(run_folder))
    assert "dog: edited in logs/null_space/dog/version_0" in " ".join(capsys.readouterr().err.split())
    said = request.getfixturevalue("refuses")(*fit, "--model.earlier", "[dog]", "--model.retain_earlier", "true")
    assert said == "model.retain_earlier=true is set by --base_edit: give the edit to start from instead."


def test_a_delta_is_not_scored(run_folder: Path, recipe: Path, refuses: Callable[..., str]) -> None:
    run("export", "--ckpt_path", str(run_folder), "--delta", "-o", "dog.safetensors")
    said = refuses("test", "--config", str(recipe), "--ckpt_path", "dog.safetensors")
    assert said.startswith("test: ckpt_path=dog.safetensors is a delta, without the run that it belongs to")


def test_what_cannot_be_started_from_is_refused(
    run_folder: Path, recipe: Path, refuses: Callable[..., str], tiny_sd: Path
) -> None:
    earlier = str(run_folder / CHECKPOINT)
    fit = ["fit", "--config", str(recipe)]
    said = refuses(*fit, "--base_edit", earlier)
    assert said == f"concept=dog adds nothing to what base_edit={earlier} edits already (dog): name a new concept."
    said = refuses(*fit, "--concept", "owl", "--base_edit", "nothing.ckpt")
    assert said.startswith("base_edit=nothing.ckpt does not exist")
    said = refuses(*fit, "--concept", "owl", "--base_edit", earlier, "--base_edit", earlier)
    assert said == f"base_edit={earlier} is given twice: once is enough."
    said = refuses(*fit, "--concept", "owl", "--base_edit", earlier, "--after", earlier)
    assert said.startswith(f"base_edit={earlier} and after={earlier} exclude each other")
    said = refuses(*fit, "--concept", "owl", "--base_edit", earlier, "--model.dtype", "bfloat16")
    assert "was made in float32, and the fit is in bfloat16: give a recipe with model.dtype: float32." in said
    said = refuses(*fit, "--concept", "Eating", "--model.concept_set", "paper20", "--base_edit", earlier)
    assert "edits 'dog', which the concept set 'paper20'" in said and "does not have" in said
    said = refuses("test", "--config", str(recipe), "--ckpt_path", earlier, "--base_edit", earlier)
    assert said == f"test: base_edit=['{earlier}'] has no effect: it is for fit; leave it out."
    said = refuses(
        "fit", "--config", "textual_inversion.yaml", "--concept", "owl", "--model", str(tiny_sd), "--base_edit", earlier
    )
    assert "TextualInversion learns words and edits nothing; leave it out." in said


def test_a_plan_names_the_edits_that_it_starts_from(
    run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("plan", "--config", str(recipe), "--concept", "owl", "--base_edit", str(run_folder))
    assert "edits that it starts from dog (ValueRefinement)" in " ".join(capsys.readouterr().out.split())
