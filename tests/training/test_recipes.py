"""Recipes are found by bare name, and every one that ships can be run on a small model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import CONFIGS
from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.methods.shared.base import ConceptEditor
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
    ],
)
def test_the_values_of_config_are_replaced(empty_folder: Path, args: list[str], expected: list[str]) -> None:
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
    recipe = name.removeprefix("sd14_") if name.startswith("sd14_") else "null_space.yaml"
    args = ["fit", "--config", str(CONFIGS / recipe)]
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
