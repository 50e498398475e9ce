"""What earlier versions wrote is read as today's.

The files in ``older`` were written by ``fit`` and ``export --delta`` when UCE and SPEED still had the settings of their
closed forms among their own arguments. They edit one matrix of a tiny model, whose values before are in ``base``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import QUIET, metadata
from lit_unlearn import cli
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.edits.checkpoint import Edit, load_edited, read_edit
from lit_unlearn.edits.older import MOVED, in_todays_terms
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.training.classes import class_of, known_classes, prepare

OLDER = Path(__file__).parent / "older"
((NAME, BASE),) = load_file(OLDER / "base.safetensors").items()

EDITS = {
    "uce": {"class_path": "RidgeMap", "init_args": {"erase_scale": 2.0, "preserve_scale": None, "lamb": 3.0}},
    "speed": {
        "class_path": "RefinedNullSpace",
        "init_args": {
            "threshold": 1.0,
            "rule": "absolute",
            "minimum": 4,
            "retain_scale": 1.0,
            "lamb": 0.5,
            "filter": False,
            "augment": 2,
        },
    },
}
"""The solver of each file, with its settings."""


@pytest.fixture
def base(broken_model: Callable[..., Path], pets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to work in, with the model and the concept set that the files were made on, and a random judge."""

    def as_then(folder: Path) -> None:
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        save_file(load_file(path) | {NAME.removeprefix("unet."): BASE}, path, metadata={"format": "pt"})

    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(broken_model(as_then), "tiny_sd")
    shutil.copy(pets, "pets.yaml")
    torch.manual_seed(0)
    JudgeTraining(width=8).save_pretrained(folder / "judge")
    return folder


def older(method: str, kind: str) -> Edit:
    """The file of ``method``, copied to where a run has it, as an edit."""
    path = Path(f"logs/{method}/dog/version_0/checkpoints/last.{kind}")
    path.parent.mkdir(parents=True)
    shutil.copy(OLDER / f"{method}.{kind}", path)
    # Its set asked the same in other words.
    as_now = {"concept_set_sha256": load_concept_set("pets.yaml").sha256}
    if kind == "ckpt":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[CHECKPOINT_KEY] |= as_now
        torch.save(checkpoint, path)
    if kind == "safetensors":  # the other weights of the model were random numbers of another machine
        with safe_open(path, framework="pt") as file:
            facts, weights = file.metadata(), {NAME: file.get_tensor(NAME).clone()}
        assert set(json.loads(facts["base_sha256"])) == {"text_encoder", "unet", "vae"}
        known = {name: json.dumps(value) for name, value in as_now.items()}
        save_file(
            weights,
            path,
            metadata={**facts, **known, "base_sha256": "{}"},
        )
    return read_edit(path)


@pytest.mark.parametrize("method", ["uce", "speed"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_file_is_read_in_todays_terms(method: str, kind: str, base: Path) -> None:
    edit = older(method, kind)
    prepare()
    kind_of_method = class_of(edit.hyper_parameters["_class_path"])
    assert edit.method == kind_of_method.__name__
    assert edit.edit == EDITS[method]
    assert not set(edit.hyper_parameters) & set(EDITS[method]["init_args"])
    solver = known_classes()[edit.edit["class_path"]]
    assert solver(**edit.edit["init_args"]).settings() == edit.edit
    # The rest are arguments of the method that it takes today.
    arguments = {name: value for name, value in edit.hyper_parameters.items() if name != "_class_path"}
    assert kind_of_method(**arguments).edited_labels == ["dog"]


@pytest.mark.parametrize("method", ["uce", "speed"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_its_weights_are_applied(method: str, kind: str, base: Path) -> None:
    edit = older(method, kind)
    assert list(edit.weights) == [NAME]
    model = BaseModel.find("tiny_sd")
    edit.check_base(model)
    before, after = load_pipeline("tiny_sd").named_parameters(), load_edited(model, edit).named_parameters()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [NAME]
    assert torch.equal(after[NAME], edit.weights[NAME])


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_its_run_is_tested_today(method: str, base: Path) -> None:
    edit = older(method, "ckpt")
    judge = json.loads(Path("judge/config.json").read_text(encoding="utf-8"))
    judge["questions"] |= {c.question: ["subject", c.name] for c in load_concept_set("pets.yaml").concepts.values()}
    Path("judge/config.json").write_text(json.dumps(judge), encoding="utf-8")
    model = ["--model.init_args.model", "tiny_sd", "--model.init_args.judge", "judge"]
    model += ["--model.init_args.concept_set", "pets.yaml"]
    args = [
        "--config",
        f"{method}.yaml",
        *model,
        "--concept",
        "dog",
        *QUIET,
        "--trainer.callbacks",
        "[EvaluationReport]",
    ]
    args += ["--model.init_args.num_inference_steps", "1", "--data.init_args.images_per_prompt", "1"]
    assert cli.main(["test", *args, "--ckpt_path", str(edit.path)]) == 0
    scores = json.loads((edit.run_folder / "scores.json").read_text(encoding="utf-8"))  # type: ignore[operator]
    then = torch.load(OLDER / f"{method}.ckpt", weights_only=True)[CHECKPOINT_KEY]["report"]
    assert then.items() <= scores["edit"].items()
    # What the file says wins over the recipe, and what it says of the solver is not asked of the method.
    text = (edit.run_folder / "config_test.yaml").read_text(encoding="utf-8")  # type: ignore[operator]
    config = yaml.safe_load(text)
    assert config["model"]["init_args"]["edited_parameters"] == "mid_block.*attn2.to_v"
    assert not set(config["model"]["init_args"]) & set(EDITS[method]["init_args"])
    assert config["edit"]["init_args"] == EDITS[method]["init_args"]


@pytest.mark.parametrize("method", ["uce", "speed"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_it_is_exported_today_with_its_solver(method: str, kind: str, base: Path) -> None:
    edit = older(method, kind)
    assert cli.main(["export", "--ckpt_path", str(edit.path), "--delta", "--output", "delta"]) == 0
    facts = metadata("delta/delta.safetensors")
    assert json.loads(facts["edit"]) == EDITS[method]
    public = {**edit.hyper_parameters, "model": json.loads(facts["base_model"])}  # all but where the base lies
    assert json.loads(facts["config"]) == public
    again = read_edit("delta/delta.safetensors")
    assert (again.edit, again.hyper_parameters) == (edit.edit, public)
    assert torch.equal(again.weights[NAME], edit.weights[NAME])


# --- the terms


def test_what_says_its_solver_is_taken_as_it_is() -> None:
    edit = {"class_path": "NullSpace", "init_args": {"ridge": 2.0}}
    arguments = {"lamb": 3.0, "tokens": "all"}
    assert in_todays_terms("UCE", arguments, edit) == (arguments, edit)


@pytest.mark.parametrize("method", ["ValueRefinement", "MEMIT", "ESD", ""])
def test_nobody_knows_the_solver_of_other_methods(method: str) -> None:
    arguments = {"lamb": 3.0, "rounds": 2}
    assert in_todays_terms(method, arguments, None) == (arguments, None)


@pytest.mark.parametrize("method", MOVED)
def test_what_moved_are_the_solvers_arguments(method: str) -> None:
    solver, names = MOVED[method]
    settings: dict[str, Any] = known_classes()[solver]().settings()
    assert set(settings["init_args"]) == set(names)
    kept, edit = in_todays_terms(method, {"seed": 1, **settings["init_args"]}, None)
    assert (kept, edit) == ({"seed": 1}, settings)


def test_a_solver_that_is_no_mapping_is_refused(base: Path) -> None:
    path = older("uce", "ckpt").path
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["edit"] = ["RidgeMap"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"is no valid edit \(its edit is no mapping\)"):
        read_edit(path)
