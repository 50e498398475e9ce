"""Start-up: what a command imports, and that a wrong name is told without importing PyTorch."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn import cli
from lit_unlearn.system.collector import RARELY

HEAVY = {"torch", "lightning", "diffusers", "transformers", "torchmetrics", "matplotlib", "jsonargparse", "tensorboard"}
SAY_MODULES = """
import json, sys
from lit_unlearn import cli
code = cli.main(sys.argv[1:])
sys.stdout.flush()
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def imported_by(*args: str, folder: Path) -> tuple[int, set[str], str]:
    """Exit code of a command in a process of its own, the modules that it imported, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SAY_MODULES, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "80"},
        check=True,
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, set(modules), done.stdout + done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["fit", "--help"],
        ["fit", "--config", "uce.yaml", "--help"],
        ["generate", "--help"],
        ["runs", "."],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_nothing_heavy(args: list[str], tmp_path: Path) -> None:
    code, modules, _ = imported_by(*args, folder=tmp_path)
    assert code == 0
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "ucee.yaml"], "There is no recipe 'ucee.yaml' (closest:"),
        (["fit", "--config", "uce.yaml", "--concept", "dgo"], "has no concept 'dgo'; closest names: dog."),
        (["fit", "--config", "uce.yaml", "--concept", "[cat, dgo]"], "has no concept 'dgo'; closest names: dog.\n"),
        (["fit", "--config", "uce.yaml", "--model.judge", "gpt"], "take clip, emoji, emoji_second, llava, nudenet,"),
        (["fit", "--config", "uce.yaml", "--model.toward", "target"], "model: UCE has no option 'toward' (closest:"),
        (["fit", "--config", "uce.yaml", "--edit.lamda", "1"], "edit: RidgeMap has no option 'lamda' (closest: lamb)."),
        (["fit", "--config", "uce.yaml", "--trainer.device", "1"], "no option --trainer.device (closest: trainer.devi"),
        (["test", "--config", "uce.yaml", "--ckpt_path", "no.ckpt"], "ckpt_path=no.ckpt does not exist"),
        (["export", "--ckpt_path", "no.ckpt", "-o", "out"], "ckpt_path=no.ckpt does not exist"),
        (["attack", "--ckpt_path", "no.ckpt"], "ckpt_path=no.ckpt does not exist"),
        (["fit", "--config", "sd14.yaml"], "sd14.yaml names no method: it is an overlay"),
        (["generate", "a dog", "--num", "0", "-o", "a.png"], "num=0 must be at least 1."),
        (["report", "nowhere"], "there is no folder nowhere."),
        (["fit", "--config", "uce.yaml", "--concept", "[dog"], "--concept=[dog cannot be read as a list: close its"),
        (
            ["fit", "--config", "uce.yaml", "--concept", "[dog", "--concept", "cat"],
            "--concept=[dog cannot be read as a list",
        ),
        (["fit", "--config", "uce.yaml", "--concept=[dog, 2024-13-45]"], "has no concept '2024-13-45'"),
        (["fit", "--config", "uce.yaml", "--concept=[dog, [cat]]"], "['cat'] is not a name: a list holds names only"),
        (["fit", "--config", "uce.yaml", "--concept"], "--concept has no value: write it behind the option"),
        (["fit", "--config", "uce.yaml", "--after", "[a.ckpt"], "--after=[a.ckpt cannot be read as a list"),
        (["fit", "--config", "uce.yaml", "--after", "[2024-11-30, 1e5]"], "after=2024-11-30 does not exist"),
        (["fit", "--config", "uce.yaml", "--config"], "--config is the last word: name a recipe behind it, e.g."),
    ],
)
def test_a_wrong_name_is_told_before_anything_heavy_is_imported(args: list[str], message: str, tmp_path: Path) -> None:
    code, modules, said = imported_by(*args, folder=tmp_path)
    assert code == 2
    assert message in said
    assert not modules & HEAVY
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", "--lora", "4"], "--delta cannot be combined with --lora"),
        (["--single_file", "a.safetensors"], "needs --format single"),
        (["--lora_names", "diffusers"], "lora_names=diffusers is for LoRA weights"),
        (["--delta", "--lora_names", "kohya"], "lora_names=kohya is for LoRA weights"),
        (["--private"], "--private is for --push_to_hub OWNER/NAME"),
    ],
)
def test_options_of_an_export_that_do_not_fit_are_told_before_pytorch(
    options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").touch()
    code, modules, said = imported_by("export", "--ckpt_path", "last.ckpt", "-o", "out", *options, folder=tmp_path)
    assert (code, message in said) == (2, True), said
    assert not modules & HEAVY


def test_a_fit_imports_only_its_own_method(recipe: Path, tmp_path: Path) -> None:
    code, modules, said = imported_by("fit", "--config", str(recipe), folder=tmp_path)
    assert code == 0, said
    assert "lit_unlearn.methods.value_refinement" in modules
    for name in ("methods.esd", "methods.uce_debias", "methods.siss", "emoji.dit", "commands.erase"):
        assert f"lit_unlearn.{name}" not in modules


def test_a_report_imports_no_library_of_models(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("{}", encoding="utf-8")
    code, modules, said = imported_by("report", ".", folder=tmp_path)
    assert (code, "scores.json is JSON but holds no scores" in said) == (2, True)
    assert not [name for name in modules if name.startswith("lit_unlearn.methods.")]
    assert "lit_unlearn.training.cli" not in modules


def test_one_parser_is_built_for_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_unlearn.training import cli as training

    built: list[str] = []
    prepare = training.UnlearnCLI._prepare_subcommand_parser

    def count(self: Any, klass: type, subcommand: str, **kwargs: Any) -> Any:
        built.append(subcommand)
        return prepare(self, klass, subcommand, **kwargs)

    monkeypatch.setattr(training.UnlearnCLI, "_prepare_subcommand_parser", count)
    monkeypatch.setattr("sys.argv", ["lit-unlearn"])
    assert cli.main(["fit", "--config", "uce.yaml", "--print_config"]) == 0
    assert built == ["fit"]


def test_the_configuration_is_written_from_one_dump(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the one with the linked values, which Lightning makes for the method's arguments."""
    from lightning.pytorch.cli import LightningArgumentParser

    dumps: list[bool] = []
    dump = LightningArgumentParser.dump

    def count(self: Any, config: Any, *args: Any, **kwargs: Any) -> str:
        if "trainer" in config and kwargs.get("skip_link_targets", True):
            dumps.append(True)
        return dump(self, config, *args, **kwargs)

    monkeypatch.setattr(LightningArgumentParser, "dump", count)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert len(dumps) == 1
    assert "concept: dog" in Path("logs/null_space/dog/version_0/config.yaml").read_text(encoding="utf-8")


def test_garbage_is_collected_rarely_only_until_the_fit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_unlearn.methods.value_refinement import ValueRefinement
    from lit_unlearn.training import cli as training

    seen = []
    start, init = ValueRefinement.on_fit_start, training.UnlearnCLI.__init__

    def note(run: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(gc.get_threshold())
            return run(*args, **kwargs)

        return noted

    monkeypatch.setattr(training.UnlearnCLI, "__init__", note(init))
    monkeypatch.setattr(ValueRefinement, "on_fit_start", note(start))
    monkeypatch.chdir(tmp_path)
    usual = gc.get_threshold()
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert seen == [RARELY, usual]
