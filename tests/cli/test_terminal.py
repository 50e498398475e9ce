"""What the commands show on the terminal: where results lie, scores, help, lists of runs, and no noise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_unlearn import cli
from lit_unlearn.training.recipes import recipe_names, recipe_summary

NOISE = ("FLOPs", "eval mode", "Loading weights", "accelerate", "torchvision", "Restoring", "Loaded model", "Epoch 0/-")


def test_every_command_says_where_its_results_lie(
    recipe: Path, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: nothing of the libraries' noise, no line of more than 80 columns but paths, and rounded scores."""
    for command, file in (("fit", "last.ckpt"), ("validate", ""), ("test", "scores.json"), ("predict", "pictures")):
        assert cli.main([command, "--config", str(recipe), "--concept", "dog"]) == 0
        out, err = capfd.readouterr()
        last = out.strip().splitlines()[-1]
        assert last.startswith(str(Path("logs/null_space/dog/version_0")))
        assert file in last
        assert not [noise for noise in NOISE if noise in out + err]
        if command == "validate":
            rows = [line.split() for line in out.splitlines() if "harmonic mean" in line]
            assert [len(cell.partition(".")[2]) for cell in rows[0] if "." in cell] in ([2, 2], [])
            assert "DataLoader" not in out


def test_a_fit_without_a_concept_says_which_one_and_why(
    recipe: Path, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert f"no --concept is given, so the one of {recipe.name} is edited: dog." in capfd.readouterr().err
    assert cli.main(["fit", "--config", str(recipe), "--concept", "dog"]) == 0
    assert "--concept" not in capfd.readouterr().err


def test_a_checkpoint_may_be_the_folder_of_a_run(run_folder: Path, recipe: Path) -> None:
    assert cli.main(["test", "--config", str(recipe), "--ckpt_path", str(run_folder)]) == 0
    assert (run_folder / "scores.json").exists()
    assert cli.main(["export", "--ckpt_path", str(run_folder), "-o", "delta.safetensors", "--delta"]) == 0


def test_a_folder_without_a_checkpoint_proposes_one_that_exists(refuses: Callable[..., str], run_folder: Path) -> None:
    message = refuses("export", "--ckpt_path", "logs", "-o", "out")
    assert (
        message
        == f"ckpt_path=logs is a folder without checkpoints/last.ckpt: give the folder of a run, e.g. {run_folder}."
    )


def test_a_fit_on_another_edit_says_how_to_edit_on_top(
    refuses: Callable[..., str], run_folder: Path, recipe: Path
) -> None:
    file = str(run_folder / "checkpoints/last.ckpt")
    message = refuses("fit", "--config", str(recipe), "--concept", "cat", "--ckpt_path", file)
    assert message == (
        f"fit: {file} edits dog, and --ckpt_path goes on with that: to edit cat too, give that file as --after "
        "(all of them are edited again) or as --base_edit (the fit starts from it) instead."
    )


def test_an_exported_pipeline_is_said_to_be_edited(
    run_folder: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "--ckpt_path", str(run_folder), "-o", "pipeline"]) == 0
    assert "shards" not in capsys.readouterr().err  # the bars of the library
    for model, what in (("pipeline", "edited (dog)"), (str(tiny_sd), "not edited")):
        args = ["generate", "a dog", "--model", model, "--num_inference_steps", "1", "-o", "a.png", "--overwrite"]
        assert cli.main(args) == 0
        said = capsys.readouterr()
        assert f", {what}, " in said.out
        assert "\n\n" not in f"\n{said.out}{said.err}"  # a bar leaves no empty line in a file


def test_an_offline_hub_model_leaves_no_folder(recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["fit", "--config", str(recipe), "--concept", "dog", "--model.model", "nobody/nothing"]) == 2
    assert not Path("logs").exists()


def test_a_closed_pipe_is_not_an_error() -> None:
    """More than a pipe holds is written, and nobody reads it."""
    script = (
        "import sys\nfrom lit_unlearn import cli\ncli.overview = lambda: 'x' * 300_000\nsys.exit(cli.main(['--help']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (cli.CLOSED_PIPE, b"")


def test_the_help_says_a_word_on_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in recipe_names():
        assert len(recipe_summary(name)) > 10
        assert next(line for line in said.splitlines() if line.startswith(f"  {name} ")).strip() != name
    assert "Exit codes:" in said


def test_the_help_of_a_fit_begins_with_the_keys_of_its_method(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["fit", "--config", str(recipe), "--help"]) == 0
    said = capsys.readouterr().out
    places = [
        said.index(text) for text in ("--model.rounds", "--edit.threshold", "--data.steps", "--trainer.max_steps")
    ]
    assert places == sorted(places)
    assert max(map(len, said.splitlines())) <= 80
    assert "[0.1]" in said  # the recipe's threshold
    assert len(said.splitlines()) < 220
    assert cli.main(["fit", "--help"]) == 0
    assert "--config null_space.yaml --help" in capsys.readouterr().out


def test_runs_are_listed_with_their_scores(run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run_folder, run_folder.parent / "version_1")
    assert cli.main(["test", "--config", str(recipe), "--ckpt_path", str(run_folder)]) == 0
    scores = json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert cli.main(["runs"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows[run_folder.as_posix()][0] == "tested"
    assert rows[run_folder.as_posix()][2] == f"{scores['retain']:.2f}"
    assert rows[(run_folder.parent / "version_1").as_posix()] == ["finished", "-", "-", "-"]
    assert cli.main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["retain"] == scores["retain"]


def test_there_are_no_runs_to_list(refuses: Callable[..., str], workplace: Path) -> None:
    assert refuses("runs") == "runs: there is no folder logs: `lit-unlearn fit` writes logs."


def test_the_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("torch", "device", "llava", "nudenet", "hub cache"):
        assert word in said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_recipes_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for word in ("doctor", "uce.yaml", "--trainer.max_steps", "--ckpt_path", "--overwrite"):
        assert word in said


def test_completion_without_shtab_says_what_to_install(
    refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert refuses("completion", "bash") == "completion needs shtab: pip install 'lit-unlearn[completion]'."


def test_progress_counts_steps_where_steps_are_the_limit() -> None:
    from types import SimpleNamespace

    from lit_unlearn.training.terminal import RunProgress, progress_bars

    bar = RunProgress()
    for epochs, said in ((-1, "Steps"), (None, "Steps"), (1, "Steps"), (3, "Epoch 1/3")):
        bar._trainer = SimpleNamespace(max_epochs=epochs)  # type: ignore[assignment]
        assert bar._get_train_description(0) == said
    assert progress_bars(None, []) == []  # the output of a test is no terminal
