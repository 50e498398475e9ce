"""``edit`` and ``score`` make what ``fit`` and ``test`` make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_unlearn as lu
from lit_unlearn import cli
from lit_unlearn.diffusion import base_model


def same_weights(first: lu.Edit, second: lu.Edit) -> bool:
    assert first.weights.keys() == second.weights.keys() != set()
    return all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())


def test_an_edit_is_the_run_of_the_command(recipe: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", str(recipe), "--concept", "dog"]) == 0
    found = lu.edit("dog", recipe=recipe, once=True)
    assert "nothing to do (--once)" in capsys.readouterr().out
    made = lu.edit("dog", recipe=recipe)
    assert (found.folder, made.folder) == tuple(
        next(Path("logs/uce").glob("dog@*")) / version for version in ("version_0", "version_1")
    )
    assert same_weights(found, made)
    assert (made.concepts, made.method, made.concept_set.name) == (["dog"], "UCE", "pets")
    assert made.report["layers"].keys() == made.weights.keys()
    assert made.scores is None


def test_settings_reach_the_fit(recipe: Path, workplace: Path, edit: lu.Edit) -> None:
    options = {"edit.lamb": 5, "model.preserve": None, "data.images_per_prompt": 2}
    other = lu.edit(["dog", "cat"], recipe=recipe, folder="mine", options=options)
    assert other.folder is not None
    content = yaml.safe_load((other.folder / "config.yaml").read_text(encoding="utf-8"))
    assert content["edit"]["init_args"]["lamb"] == 5
    assert content["data"]["init_args"]["images_per_prompt"] == 2
    assert other.concepts == ["dog", "cat"]
    assert other.folder.parts[0] == "mine"
    assert not same_weights(edit, other)


def test_an_edit_on_top_of_another_and_without_it(recipe: Path, workplace: Path, edit: lu.Edit, tiny_sd: Path) -> None:
    more = lu.edit("cat", recipe=recipe, base_edit=edit)
    assert (more.concepts, [link.concepts for link in more.content.chain]) == (["dog", "cat"], [["dog"], ["cat"]])
    left = lu.undo(more, "cat", "dog.safetensors", model=tiny_sd)
    assert left.concepts == ["dog"] and same_weights(left, edit)
    with pytest.raises(lu.UserError, match="cannot be taken out"):
        lu.undo(more, 1, "cat.safetensors", model=tiny_sd)


def test_random_numbers_go_on_as_if_nothing_was_drawn(recipe: Path, workplace: Path) -> None:
    before = torch.get_rng_state()
    lu.edit("dog", recipe=recipe)
    assert torch.equal(before, torch.get_rng_state())


def plain(scores: dict[str, Any] | None) -> dict[str, Any]:
    """Scores without seconds and memory."""
    assert scores is not None
    return {name: value for name, value in scores.items() if name not in ("cost", "edit")}


def test_scores_are_those_of_the_command(recipe: Path, edit: lu.Edit) -> None:
    scores = lu.score(edit)
    assert edit.folder is not None
    assert scores == edit.scores == json.loads((edit.folder / "scores.json").read_text(encoding="utf-8"))
    with pytest.raises(lu.UserError, match=r"scores.json exists: pass --overwrite to test this run again"):
        lu.score(edit)
    again = ["--config", str(recipe), "--concept", "dog", "--ckpt_path", str(edit.path), "--overwrite"]
    assert cli.main(["test", *again]) == 0
    assert plain(edit.scores) == plain(scores)
    more = lu.score(edit.folder, images_per_prompt=2, overwrite=True)
    assert more["images_per_concept"] == 2 * scores["images_per_concept"]


def test_a_set_without_a_file_is_written_beside_its_runs(recipe: Path, workplace: Path, pets: str) -> None:
    content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
    content["concepts"]["dog"]["target"] = "teapot"
    Path("mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    mine = lu.ConceptSet.load("mine.yaml")
    Path("mine.yaml").unlink()
    edits = [lu.edit("dog", recipe=recipe, concept_set=mine) for _ in range(2)]
    (written,) = Path("logs").rglob("concepts.yaml")
    assert lu.ConceptSet.load(written).sha256 == mine.sha256 == edits[1].concept_set.sha256
    assert [edit.folder for edit in edits] == [written.parent / f"version_{number}" for number in range(2)]
    by_file = lu.edit("dog", recipe=recipe, concept_set=pets)
    assert by_file.concept_set.get("dog").target == "soccer ball"


def test_a_concept_in_no_set(tiny_sd: Path, workplace: Path) -> None:
    options = {"model.num_inference_steps": 1, "trainer.accelerator": "cpu"}
    more: dict[str, Any] = {"judge": "none", "model": tiny_sd, "recipe": "uce", "options": options, "folder": "runs"}
    edit = lu.edit("Mickey Mouse", to="a cartoon mouse", kind="character", protect=["Minnie Mouse"], **more)
    assert edit.concepts == ["Mickey Mouse"]
    assert edit.concept_set.get("Mickey Mouse").target == "a cartoon mouse"
    assert edit.concept_set.get("Mickey Mouse").adjacent == ("Minnie Mouse",)
    assert edit.folder is not None
    assert edit.folder.parent.name.startswith("Mickey_Mouse@erase-")
    assert (edit.folder.parent / "recipe.yaml").is_file()
    assert Path("runs") in edit.folder.parents
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concept": []}, r"concept=\[\] names nothing"),
        ({"concept": " "}, "concept=' ' names nothing"),
        ({"concept": "dog", "kind": "style"}, "kind='style' is for a concept that is in no set"),
        ({"concept": "dog", "protect": ["cat"]}, r"protect=\['cat'\] is for a concept that is in no set"),
        ({"concept": ["dog", "cat"], "to": "owl"}, "does not go with several concepts"),
        ({"concept": "dog", "to": "owl", "concept_set": "emoji20"}, "does not go with concept_set"),
        ({"concept": "dog", "to": "a dog"}, "to='a dog' is the concept itself"),
        ({"concept": "dog", "to": "owl", "kind": "beast"}, "kind='beast' is not one of object"),
        ({"concept": "dog", "options": {"concept": "cat"}}, "options has 'concept', which is not the key of a setting"),
        ({"concept": "dog", "options": {"edit.help": "x"}}, "options has 'edit.help'"),
        (
            {"concept": "dog", "options": {"edit.ridge": object()}},
            r"options\['edit.ridge'\] is a object: give a number",
        ),
        ({"concept": "dog", "options": {"edit.ridge": "x"}}, "ridge"),
        ({"concept": "dog", "concept_set": "none.yaml"}, "The concept set none.yaml cannot be read"),
        ({"concept": "dog", "model": "nowhere/model.safetensors"}, "nowhere/model.safetensors"),
        ({"concept": "dog", "model": object()}, "model is a pipeline that is loaded"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_a_model_is_loaded(
    arguments: dict[str, Any], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base_model, "load_parts", loaded)
    with pytest.raises(lu.UserError, match=message) as told:
        lu.edit(**arguments)
    assert "\n" not in str(told.value)
    assert not list(workplace.iterdir())


def test_only_a_run_is_scored(edit: lu.Edit, tiny_sd: Path) -> None:
    delta = lu.export(edit, "delta.safetensors", format="delta", model=tiny_sd)
    with pytest.raises(lu.UserError, match=r"delta.safetensors does not lie in a run's folder"):
        lu.score(delta)


@pytest.mark.slow
def test_weights_of_uce_on_the_embedded_model_are_those_of_the_command(workplace: Path) -> None:
    edit = lu.edit("dog", recipe="uce", folder="mine")
    assert cli.main(["fit", "--config", "uce.yaml", "--concept", "dog"]) == 0
    command = lu.Edit("logs/uce/dog/version_0")
    assert same_weights(edit, command)
