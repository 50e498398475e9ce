"""Where runs lie, what their checkpoints hold, and which value rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import CONFIGS, files
from lit_unlearn import cli
from lit_unlearn.data import concepts
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.system import strict_yaml
from lit_unlearn.system.errors import UserError
from lit_unlearn.training import cli as training


def test_a_fit_leaves_everything_in_its_version_folder(finished: Path) -> None:
    folder = finished / "logs" / "null_space" / "dog" / "version_0"
    written = files(folder)
    assert {"config.yaml", "hparams.yaml", "checkpoints/last.ckpt"} <= written
    assert [name for name in written if name.startswith("events.out.tfevents")]
    assert {path.name for path in finished.iterdir()} == {"logs"}
    assert len(written) == len(files(finished))


def test_the_checkpoint_holds_the_edit(finished: Path, tiny_sd: Path) -> None:
    state = torch.load(finished / "logs/null_space/dog/version_0/checkpoints/last.ckpt", weights_only=True)
    names = state[CHECKPOINT_KEY]["edited_names"]
    before = load_pipeline(str(tiny_sd)).named_parameters()
    for name in names:
        # The edit comes after the validation of its epoch; a checkpoint made there would lack it.
        assert not torch.equal(state["state_dict"][name], before[name]), name
    assert len(names) == 2


def test_a_fit_reads_its_concept_set_once(workplace: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []

    def load_yaml(content: bytes, path: Path) -> object:
        parsed.append(path)
        return strict_yaml.load_yaml(content, path)

    monkeypatch.setattr(concepts, "load_yaml", load_yaml)
    concepts._read.cache_clear()  # this process has read it before
    assert cli.main(["fit", "--config", str(recipe)]) == 0  # the command line, the method and the data ask for it
    assert [path.name for path in parsed] == ["emoji20.yaml"]


def test_two_long_lists_of_concepts_have_folders_of_their_own(recipe: Path, workplace: Path) -> None:
    names = list(concepts.load_concept_set("emoji20").concepts)
    lists = [names[:18], [*names[:17], names[18]]]
    folders = []
    for chosen in lists:
        with pytest.raises(UserError, match="needs a run, and logs/null_space/") as caught:
            training.run(["test", "--config", str(recipe), "--concept", str(chosen)])
        folders.append(str(caught.value).split()[5])
    assert folders[0] != folders[1]
    assert all("+17_others-" in folder for folder in folders)


def test_each_fit_has_a_folder_of_its_own(run_folder: Path) -> None:
    assert cli.main(["fit", "--config", str(run_folder / "config.yaml"), "--concept", "[Soccer_Ball, cat]"]) == 0
    assert cli.main(["fit", "--config", str(run_folder / "config.yaml")]) == 0
    assert {path.parent.parent.as_posix() for path in Path("logs").rglob("last.ckpt")} == {
        "logs/null_space/dog/version_0",
        "logs/null_space/dog/version_1",
        "logs/null_space/soccer_ball+cat/version_0",
    }


def test_a_logger_of_the_recipe_is_used(recipe: Path, workplace: Path) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine"]
    assert cli.main(["fit", "--config", str(recipe), *logger]) == 0
    assert "lightning_logs/version_0/config.yaml" in files(Path("mine"))
    assert not Path("logs").exists()


def test_a_fit_resumes_in_its_folder(run_folder: Path, recipe: Path) -> None:
    ckpt_path = run_folder / "checkpoints" / "last.ckpt"
    more = ["--model.rounds", "2", "--ckpt_path", str(ckpt_path)]
    assert torch.load(ckpt_path, weights_only=True)["epoch"] == 1  # the second of two layers, counted from 0
    assert cli.main(["fit", "--config", str(recipe), *more]) == 0
    assert torch.load(ckpt_path, weights_only=True)["epoch"] == 3
    assert [path.name for path in run_folder.parent.iterdir()] == ["version_0"]


class ParsedCLI(training.UnlearnCLI):
    """Builds everything and stops before the trainer runs."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*args: str) -> ParsedCLI:
    training.prepare()
    return ParsedCLI(args)


def test_one_concept_rules_model_and_data(recipe: Path, workplace: Path) -> None:
    for given, expected in (("cat", "cat"), ("[dog, cat]", ["dog", "cat"]), ("soccer ball", "soccer ball")):
        parsed = parse("fit", "--config", str(recipe), "--concept", given)
        assert parsed.model.hparams["concept"] == parsed.datamodule.hparams["concept"] == expected


def test_one_concept_set_rules_model_and_data(recipe: Path, workplace: Path) -> None:
    path = Path("mine.yaml").absolute()
    shutil.copy(parse("fit", "--config", str(recipe)).model.concepts.path, path)
    parsed = parse("fit", "--config", str(recipe), "--model.concept_set", str(path))
    assert parsed.model.concepts.path == parsed.datamodule.concepts.path == path


def test_the_seed_of_a_fit_is_one_and_not_that_of_the_pictures(recipe: Path, workplace: Path) -> None:
    parsed = parse("fit", "--config", str(recipe), "--seed_everything", "3", "--data.init_args.seed", "5")
    assert (parsed.model.hparams["seed"], parsed.datamodule.seed) == (3, 5)


@pytest.mark.parametrize(
    ("option", "source"),
    [
        ("--model.init_args.seed=3", "--seed_everything"),
        ("--model.seed", "--seed_everything"),
        ("--data.concept", "--concept"),
        ("--data.init_args.concept_set", "--model.init_args.concept_set"),
    ],
)
def test_an_option_that_follows_another_is_refused(
    refuses: Callable[..., str], recipe: Path, option: str, source: str
) -> None:
    given = [option] if "=" in option else [option, "3"]
    assert f"{option.partition('=')[0]} is set by {source}" in refuses("fit", "--config", str(recipe), *given)


def test_a_seed_of_chance_is_refused(refuses: Callable[..., str], recipe: Path) -> None:
    assert "give a number" in refuses("fit", "--config", str(recipe), "--seed_everything", "true")


def test_a_training_without_concepts_has_no_links(workplace: Path) -> None:
    path = CONFIGS / "emoji" / "judge.yaml"
    parsed = parse("fit", "--config", str(path))
    assert isinstance(parsed.model, JudgeTraining)
    assert Path(parsed.trainer.log_dir) == Path("logs/emoji/judge/version_0")


def test_the_edit_is_the_checkpoints_and_the_pictures_are_the_command_lines(run_folder: Path, recipe: Path) -> None:
    options = ["--model.rounds", "7", "--model.num_inference_steps", "9", "--concept", "Dog"]
    parsed = parse("test", "--config", str(recipe), *options, "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"))
    assert (parsed.model.hparams["rounds"], parsed.model.num_inference_steps) == (1, 9)
    assert Path(parsed.trainer.log_dir) == run_folder


def test_a_test_is_kept_with_its_run_and_not_replaced(
    run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = (run_folder / "config.yaml").read_text(encoding="utf-8")
    assert cli.main(["test", "--config", str(recipe)]) == 0  # of the newest run
    assert "last.ckpt" in capsys.readouterr().out
    assert {"scores.json", "grid.png", "config_test.yaml"} <= files(run_folder)
    assert (run_folder / "config.yaml").read_text(encoding="utf-8") == fitted

    kept = (run_folder / "scores.json").read_text(encoding="utf-8")
    assert cli.main(["test", "--config", str(recipe)]) == 2
    assert "scores.json exists: pass --overwrite" in capsys.readouterr().err
    (run_folder / "scores.json").write_text("stale", encoding="utf-8")
    assert cli.main(["test", "--config", str(recipe), "--overwrite"]) == 0
    assert (
        json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))["per_concept"]
        == json.loads(kept)["per_concept"]
    )


def test_a_test_needs_a_run(refuses: Callable[..., str], recipe: Path) -> None:
    message = refuses("test", "--config", str(recipe), "--concept", "cat")
    assert message.startswith("test needs a run, and logs/null_space/cat has none: run `lit-unlearn fit` first")
