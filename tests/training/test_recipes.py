"""Recipes are found by bare name, and every one that ships can be run on a small model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import CONFIGS
from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.core.solvers import RidgeMap
from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.system.errors import UserError
from lit_unlearn.training import cli as training
from lit_unlearn.training import recipes

RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
CONTENT: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")) for name in RECIPES
}
COMPLETE = [name for name in RECIPES if "class_path" in CONTENT[name].get("model", {})]
OVERLAYS = [name for name in RECIPES if name not in COMPLETE]
EDITS = [name for name in COMPLETE if "concept" in CONTENT[name]]
UNLEARNINGS = [name for name in COMPLETE if CONTENT[name]["data"]["class_path"] == "KeepForgetImages"]


class ParsedCLI(training.UnlearnCLI):
    """Builds everything that a recipe names and stops before the trainer runs."""

    def _run_subcommand(self, subcommand: str) -> None:
        assert subcommand == "fit"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_of_the_package_is_found_from_anywhere(empty_folder: Path) -> None:
    assert recipes.find_recipe("null_space.yaml") == CONFIGS / "null_space.yaml"
    assert recipes.find_recipe("null_space") == CONFIGS / "null_space.yaml"
    assert recipes.find_recipe("emoji/judge.yaml") == CONFIGS / "emoji" / "judge.yaml"


def test_a_file_as_given_comes_first_then_configs_here_then_the_package(empty_folder: Path) -> None:
    name = "null_space.yaml"
    assert recipes.find_recipe(name) == CONFIGS / name
    (empty_folder / "configs").mkdir()
    (empty_folder / "configs" / name).write_text("method: mine", encoding="utf-8")
    assert recipes.find_recipe(name) == Path("configs") / name
    (empty_folder / name).write_text("method: nearer", encoding="utf-8")
    assert recipes.find_recipe(name) == Path(name)


def test_a_wheel_has_its_recipes_inside_the_package(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = empty_folder / "site-packages" / "lit_unlearn"
    foreign = package.parent / "configs"  # of some other package
    for folder in (package / "configs" / "emoji", foreign):
        folder.mkdir(parents=True)
        (folder / "judge.yaml").write_text("method: x", encoding="utf-8")
    monkeypatch.setattr(recipes, "files", lambda name: package)
    assert recipes.find_recipe("emoji/judge.yaml") == package / "configs" / "emoji" / "judge.yaml"
    assert recipes.recipe_names() == ["emoji/judge.yaml"]


def test_names_of_recipes_are_those_that_are_found(empty_folder: Path) -> None:
    assert set(recipes.recipe_names()) == set(RECIPES)
    for name in recipes.recipe_names():
        recipes.find_recipe(name)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "--config", "a.yaml", "--config", "b.yaml"], ["fit", "--config", "a.yaml", "--config", "b.yaml"]),
        (["fit", "-c", "emoji/vae.yaml"], ["fit", "-c", str(CONFIGS / "emoji/vae.yaml")]),
        (["fit", "--config=null_space"], ["fit", f"--config={CONFIGS / 'null_space.yaml'}"]),
        (["fit", "--concept", "null_space.yaml"], ["fit", "--concept", "null_space.yaml"]),
        (["fit", "--model", "emoji-dit"], ["fit", "--model.model", "emoji-dit"]),
        (["fit", "--model=owner/name"], ["fit", "--model.model=owner/name"]),
        (["fit", "--after=[a, b]", "--after", "c"], ["fit", "--after", "[a, b, c]"]),
        (["fit", "--base_edit", "a", "--base_edit=b c"], ["fit", "--base_edit", "[a, b c]"]),
        (["fit", "--model", "~/sd", "--concept", "a"], ["fit", "--model.model", "~/sd", "--concept", "a"]),
        (["fit", "--model", "configs"], ["fit", "--model.model", "configs"]),  # a folder that is there
        (["fit", "--model", "UCE"], ["fit", "--model", "UCE"]),
        (
            ["fit", "--model", "my.Method", "--model.model", "a/b"],
            ["fit", "--model", "my.Method", "--model.model", "a/b"],
        ),
    ],
)
def test_the_values_of_config_are_replaced(empty_folder: Path, args: list[str], expected: list[str]) -> None:
    Path("configs").mkdir()
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text("concept: dog", encoding="utf-8")
    assert recipes.resolve_recipes(args) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul_space.yaml", None, r"no recipe 'nul_space.yaml' \(closest: null_space.yaml\)"),
        ("qqq", None, r"no recipe 'qqq' \(recipes: .*null_space.yaml"),
        ("broken.yaml", "a: [1,\nb: 2", "broken.yaml is not valid YAML: .* in line 2"),
        ("list.yaml", "- a\n- b", "list.yaml holds no keys"),
        ("empty.yaml", "", "empty.yaml holds no keys"),
    ],
)
def test_what_is_no_recipe(empty_folder: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        Path(name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        recipes.find_recipe(name)


def test_a_recipe_that_is_not_text(empty_folder: Path) -> None:
    Path("picture.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"picture\.yaml is not text"):
        recipes.find_recipe("picture.yaml")


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_recipe_is_complete(empty_folder: Path, tiny_sd: Path, name: str) -> None:
    training.prepare()
    model = ["--model.init_args.model", str(tiny_sd)]
    cli = ParsedCLI(["fit", "--config", str(CONFIGS / name), *model, "--concept", "[dog, soccer ball]"])
    assert isinstance(cli.model, ConceptEditor)
    # A link into a class without the argument would be dropped without a word.
    assert cli.model.hparams["concept"] == cli.datamodule.hparams["concept"] == ["dog", "soccer ball"]
    assert cli.trainer.log_dir == f"logs/{CONTENT[name]['method']}/dog+soccer_ball/version_0"
    assert not list(empty_folder.iterdir())


@pytest.fixture
def memorised(empty_folder: Path, tiny_sd: Path, keep_forget: dict[str, str]) -> Path:
    """What recipes of data unlearning find where ``emoji/memorise.yaml`` has written it."""
    folder = empty_folder / "checkpoints" / "emoji-sd-memorised"
    shutil.copytree(tiny_sd, folder)
    for name, source in {**keep_forget, "held_out": keep_forget["keep"]}.items():
        shutil.copytree(source, folder / "images" / name)
    return folder


@pytest.mark.parametrize("name", UNLEARNINGS)
def test_a_recipe_of_data_unlearning_is_complete(memorised: Path, empty_folder: Path, name: str) -> None:
    training.prepare()
    cli = ParsedCLI(["fit", "--config", str(CONFIGS / name)])
    assert isinstance(cli.model, DataUnlearning)
    assert cli.trainer.log_dir == f"logs/{CONTENT[name]['method']}/version_0"
    assert [path.name for path in empty_folder.iterdir()] == ["checkpoints"]


def test_methods_of_recipes_differ() -> None:
    labels = [CONTENT[name]["method"] for name in (*EDITS, *UNLEARNINGS)]
    assert len(set(labels)) == len(labels) > 0


def contains(whole: Any, part: Any) -> bool:
    """Whether all that ``part`` says, in however deep a mapping, is so in ``whole``."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_a_recipe(memorised: Path, name: str) -> None:
    training.prepare()
    of_method = re.fullmatch(r"(sd14|sdxl|sd35|flux)_(.*)", name)
    recipe = of_method[2] if of_method else "null_space.yaml"
    args = ["fit", "--config", str(CONFIGS / recipe)]
    if of_method and of_method[1] != "sd14":  # what it edits is in models of its family only
        args += ["--config", str(CONFIGS / f"{of_method[1]}.yaml")]
    before = ParsedCLI(args).config.fit.as_dict()
    after = ParsedCLI([*args, "--config", str(CONFIGS / name)]).config.fit.as_dict()
    assert contains(after, CONTENT[name])
    assert not contains(before, CONTENT[name])


@pytest.mark.parametrize("name", [name for name in COMPLETE if name not in EDITS])
def test_a_training_recipe_names_keys_that_exist(empty_folder: Path, name: str) -> None:
    training.prepare()
    with pytest.raises(SystemExit) as ended:  # --print_config parses and checks, and builds nothing
        training.UnlearnCLI(["fit", "--config", str(CONFIGS / name), "--print_config"])
    assert ended.value.code == 0


# --- the key edit

NULL_SPACE = {"class_path": "NullSpace", "init_args": {"threshold": 0.5, "minimum": 4}}
OLD: dict[str, Any] = {
    "null_space": {
        "trainer": {"callbacks": [{"class_path": "NullSpaceEdit", "init_args": {"threshold": 0.5, "minimum": 4}}]},
        "model": {"class_path": "ValueRefinement", "init_args": {"rounds": 2}},
    },
    "memit": {
        "trainer": {"callbacks": {"class_path": "lit_unlearn.callbacks.closed_form.LeastSquaresEdit"}},
        "model": {"class_path": "MEMIT"},
    },
    "uce": {
        "trainer": {"callbacks": [{"class_path": "EvaluationReport"}, {"class_path": "UCEEdit"}]},
        "model": {"class_path": "UCE", "init_args": {"tokens": "all", "lamb": 3.0, "preserve_scale": None}},
    },
    "speed": {
        "trainer": {"callbacks": ["SPEEDEdit"]},
        "model": {"class_path": "SPEED", "init_args": {"threshold": 0.5, "minimum": 4, "filter": False, "seed": 1}},
    },
}
"""Recipes as earlier versions had them, cut down to what matters here."""
SOLVERS = {
    "NullSpace": ["threshold", "rule", "minimum", "ridge", "ridge_rule"],
    "LeastSquares": ["ridge", "retain_weight", "moment"],
    "RidgeMap": ["erase_scale", "preserve_scale", "lamb"],
    "RefinedNullSpace": ["threshold", "rule", "minimum", "retain_scale", "lamb", "filter", "augment"],
}
NEW: dict[str, Any] = {
    "null_space": NULL_SPACE,
    "memit": {"class_path": "LeastSquares", "init_args": {}},
    "uce": {"class_path": "RidgeMap", "init_args": {"lamb": 3.0, "preserve_scale": None}},
    "speed": {"class_path": "RefinedNullSpace", "init_args": {"threshold": 0.5, "minimum": 4, "filter": False}},
}


def parsed(*args: str) -> ParsedCLI:
    """What ``lit-unlearn fit`` builds of its arguments, without running it."""
    training.prepare()
    return ParsedCLI(recipes.resolve_recipes(["fit", *args, "--concept", "dog"]))


def settings(cli: ParsedCLI) -> dict[str, Any]:
    """The solver that a command line has come to, with its settings."""
    (edit,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, ClosedFormEdit)]
    assert cli.trainer.callbacks.index(edit) == 0  # others look at the edited model
    return edit.solver.settings()


@pytest.mark.parametrize("method", OLD)
def test_an_old_recipe_is_refused_with_its_new_form(empty_folder: Path, tiny_sd: Path, method: str) -> None:
    Path("old.yaml").write_text(yaml.safe_dump(OLD[method]), encoding="utf-8")
    with pytest.raises(UserError, match=r"^The recipe old\.yaml is of an earlier version: take \w+Edit") as caught:
        recipes.find_recipe("old.yaml")
    told = re.search(r"and write `(.*)` instead\.$", str(caught.value))
    assert told is not None
    new = yaml.safe_load(told[1])
    assert new == {"edit": NEW[method]}

    # As told: the callback goes, the key comes, what moved goes.
    moved = re.search(r", and (.*) out of model", str(caught.value))
    arguments = dict(OLD[method]["model"].get("init_args", {}))
    if moved is not None:
        for name in moved[1].split(", "):
            arguments.pop(name, None)
    assert set(arguments) <= {"rounds", "tokens", "seed"}
    model = {**OLD[method]["model"], "init_args": {**arguments, "model": str(tiny_sd)}}
    recipe = {"model": model, "data": {"class_path": "ConceptPrompts"}}
    Path("new.yaml").write_text(f"{yaml.safe_dump(recipe)}{told[1]}\n", encoding="utf-8")
    found = settings(parsed("--config", "new.yaml"))
    assert found["class_path"] == NEW[method]["class_path"]
    assert NEW[method]["init_args"].items() <= found["init_args"].items()


def test_another_recipe_that_speaks_of_an_old_callback_is_none(empty_folder: Path) -> None:
    Path("new.yaml").write_text("# NullSpaceEdit is gone\nmethod: UCEEdit\n", encoding="utf-8")
    assert recipes.find_recipe("new.yaml") == Path("new.yaml")


@pytest.mark.parametrize("name", [name for name in EDITS if "edit" in CONTENT[name]])
def test_the_solver_of_a_recipe_has_its_settings(empty_folder: Path, tiny_sd: Path, name: str) -> None:
    found = settings(parsed("--config", name, "--model.init_args.model", str(tiny_sd)))
    assert found["class_path"] == CONTENT[name]["edit"]["class_path"]
    assert CONTENT[name]["edit"]["init_args"].items() <= found["init_args"].items()


@pytest.mark.parametrize(
    "args",
    [
        ["--edit.threshold", "0.02", "--config", "null_space.yaml"],
        ["--config", "null_space.yaml", "--edit.threshold", "0.02"],
        ["--edit.init_args.threshold=0.02", "--config=null_space.yaml"],
    ],
)
def test_options_win_over_the_recipe_wherever_they_stand(empty_folder: Path, tiny_sd: Path, args: list[str]) -> None:
    found = settings(parsed(*args, "--model.init_args.model", str(tiny_sd)))
    assert found["class_path"] == "NullSpace"
    assert found["init_args"] == {
        "threshold": 0.02,
        "rule": "mean",
        "minimum": 0,
        "ridge": 100.0,
        "ridge_rule": "absolute",
        "forget_unused": False,
        "tolerance": None,
    }


def test_another_solver_takes_the_place_of_the_recipes(empty_folder: Path, tiny_sd: Path) -> None:
    args = ["--config", "null_space.yaml", "--model.init_args.model", str(tiny_sd), "--edit", "RidgeMap"]
    defaults = RidgeMap().settings()
    assert settings(parsed(*args)) == defaults
    found = settings(parsed(*args, "--edit.lamb", "7"))
    assert found == {"class_path": "RidgeMap", "init_args": {**defaults["init_args"], "lamb": 7.0}}


@pytest.mark.parametrize(("kind", "arguments"), SOLVERS.items())
def test_help_lists_what_a_solver_can_be_told(
    kind: str, arguments: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.prepare()
    with pytest.raises(SystemExit) as caught:
        training.run(["fit", "--edit.help", kind])
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert all(f"--edit.{name}" in shown for name in arguments)


def test_the_folder_of_a_single_file_belongs_to_the_model() -> None:
    given = ["fit", "--model", "a/b.safetensors", "--config_folder", "sd", "--config_folder=x"]
    expected = ["fit", "--model.model", "a/b.safetensors", "--model.config_folder", "sd", "--model.config_folder=x"]
    assert recipes.resolve_recipes(given) == expected
