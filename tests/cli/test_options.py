"""What was asked is what is done: options without effect are refused, and those that are lost are kept or said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers import files
from lit_unlearn import cli
from lit_unlearn.training import cli as training
from lit_unlearn.training.recipes import resolve_recipes


@pytest.fixture(scope="session")
def esd(recipe: Path) -> Path:
    """Two epochs of two steps of ESD on a tiny pipeline."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del content["edit"]
    arguments = content["model"]["init_args"]
    arguments |= {"num_chain_steps": 3, "chains": 2}
    arguments["optimizer"]["init_args"]["lr"] = 1e-3
    content |= {"method": "esd", "model": {"class_path": "ESD", "init_args": arguments}}
    content["trainer"]["max_epochs"] = 2
    content["data"]["init_args"]["batch_size"] = 1
    path = recipe.parent / "tiny_esd.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


NO_EFFECT = {
    "esd": [
        ("--trainer.fast_dev_run=1", "fit: trainer.fast_dev_run=1 would keep nothing"),
        (
            "--trainer.limit_train_batches=1",
            "fit: trainer.limit_train_batches=1 would end epochs before",
        ),
        ("--trainer.limit_train_batches=0.5", "fit: trainer.limit_train_batches=0.5 would end epochs"),
        ("--trainer.overfit_batches=1", "fit: trainer.overfit_batches=1 would end epochs"),
        ("--trainer.limit_val_batches=3", "fit: trainer.limit_val_batches=3 has no effect: a fit draws no validation"),
        ("--trainer.check_val_every_n_epoch=2", "fit: trainer.check_val_every_n_epoch=2 has no effect"),
        ("--trainer.enable_checkpointing=false", "fit: trainer.enable_checkpointing=False would keep nothing"),
        ("--trainer.gradient_clip_algorithm=norm", "fit: trainer.gradient_clip_algorithm=norm has no effect without"),
        ("--trainer.min_epochs=9", "fit: trainer.min_epochs=9 has no effect: nothing ends the fit early"),
        ("--trainer.max_epochs=-1", "fit: trainer.max_epochs=-1 does not say how long the fit is"),
        ("--overwrite", "fit: overwrite=True has no effect: each fit has a folder of its own"),
    ],
    "null_space": [
        (
            "--trainer.max_epochs=3",
            "fit: trainer.max_epochs=3 has no effect on ValueRefinement, whose length",
        ),
        ("--trainer.devices=two", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
        (
            "--edit={class_path: NullSpace, init_args: {treshold: 1}}",
            "edit: NullSpace has no option 'treshold'",
        ),
        ("--trainer.precision=fp16", "trainer.precision: int or one of ['transformer-engine'"),
        ("--trainer.limit_test_batches=x", "trainer.limit_test_batches: int or float expected, got x."),
        ("--model.optimizer.lr=high", "model.optimizer.lr: float expected, got high."),
        ("--model.optimizer=Adm", "model.optimizer: there is no class or file 'Adm' (closest: Adam)."),
        ("--model.optimizer.lrr=1", "model.optimizer: Adam has no option 'lrr' (closest: lr)."),
        ("--model.init_args=x", "model: settings expected, as in {key: value}, got x."),
        ("--steps=3", "there is no option --steps (closest: data.steps)."),
        ("--threshold=3", "there is no option --threshold (closest: edit.threshold)."),
        ("--modl.rounds=2", "there is no option --modl.rounds (closest: model.rounds)."),
    ],
}


@pytest.mark.parametrize(
    ("method", "option", "message"), [(m, *case) for m, cases in NO_EFFECT.items() for case in cases]
)
def test_an_option_without_effect_or_of_no_kind_is_refused(
    refuses: Callable[..., str], recipe: Path, esd: Path, method: str, option: str, message: str
) -> None:
    assert refuses("fit", option, "--config", str(esd if method == "esd" else recipe)).startswith(message)


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--data.steps=3", "data.steps=3"),
        ("--data.batch_size=2", "data.batch_size=2"),
        ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val=1"),
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=2"),
    ],
)
def test_a_method_of_one_step_has_no_steps_to_set(refuses: Callable[..., str], option: str, key: str) -> None:
    assert refuses("fit", option, "--config", "uce.yaml").startswith(f"fit: {key} has no effect on UCE")


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--trainer.gradient_clip_val=1", "model.max_grad_norm"),
        ("--trainer.accumulate_grad_batches=2", "data.batch_size and model.micro_batch_size"),
    ],
)
def test_a_method_that_steps_by_itself_names_its_own_setting(
    refuses: Callable[..., str], option: str, instead: str
) -> None:
    said = refuses("fit", "--config", "siss.yaml", option)
    assert "has no effect on SISS, which steps by itself" in said and instead in said


def test_what_is_for_a_fit_is_refused_elsewhere(refuses: Callable[..., str], recipe: Path) -> None:
    assert refuses("test", "--config", str(recipe), "--once").startswith("test: once=True has no effect: it is for fit")
    both = ["--fresh", "--ckpt_path", "last"]
    assert refuses("fit", "--config", str(recipe), *both).startswith("fit: fresh=True and ckpt_path=last exclude")


class ParsedCLI(training.UnlearnCLI):
    """Builds everything and stops before the trainer runs."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed(*args: str) -> ParsedCLI:
    training.prepare()
    return ParsedCLI(resolve_recipes(["fit", *args]))


@pytest.mark.parametrize(
    ("given", "concepts"),
    [
        (["--concept", "dog", "--concept", "cat"], ["dog", "cat"]),
        (["--concept=dog", "--concept", "[cat, soccer ball]"], ["dog", "cat", "soccer ball"]),
        (["--concept", "cat"], "cat"),
    ],
)
def test_concepts_given_one_by_one_are_a_list(
    workplace: Path, recipe: Path, given: list[str], concepts: str | list[str]
) -> None:
    for args in ([*given, "--config", str(recipe)], ["--config", str(recipe), *given]):
        assert parsed(*args).model.hparams["concept"] == concepts


def test_options_win_over_recipes_and_recipes_over_earlier_ones(workplace: Path, recipe: Path) -> None:
    Path("over.yaml").write_text("edit: {init_args: {ridge: 7.0}}\ndata: {init_args: {steps: 5}}", encoding="utf-8")
    args = ["--edit.threshold", "0.5", "--config", str(recipe), "--data.steps=3", "--config", "over.yaml"]
    config = parsed(*args).config.fit
    assert (config.edit.init_args.threshold, config.edit.init_args.ridge, config.data.init_args.steps) == (0.5, 7.0, 3)


def test_a_callback_of_lightnings_can_be_added(workplace: Path, recipe: Path) -> None:
    timed = parsed("--config", str(recipe), "--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:01:00")
    kinds = [type(callback).__name__ for callback in timed.trainer.callbacks]
    assert kinds.count("Timer") == kinds.count("ClosedFormEdit") == kinds.count("EvaluationReport") == 1
    saved = parsed("--config", str(recipe), "--trainer.callbacks+=ModelCheckpoint")
    assert saved.trainer.checkpoint_callback.filename == "last"  # a run has that whatever else is saved


def test_a_list_of_callbacks_that_loses_the_report_keeps_it(
    run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ["--config", str(recipe), "--trainer.callbacks=ModelSummary"]
    assert cli.main(["test", *others]) == 0
    assert (
        "trainer.callbacks has no EvaluationReport, which writes what test is for: it is kept."
        in capsys.readouterr().err
    )
    assert "scores.json" in files(run_folder)
    assert cli.main(["predict", *others]) == 0
    assert "has no SavePictures" in capsys.readouterr().err
    assert [name for name in files(run_folder) if name.startswith("pictures/")]


def test_a_test_says_which_options_the_checkpoint_overrules(
    run_folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.prepare()
    ParsedCLI(["test", "--config", str(recipe), "--model.rounds", "7", "--edit.threshold=0.1"])
    said = capsys.readouterr().err
    assert "is tested as its fit has made it, whatever is asked: model.rounds=7 (it has 1)." in said
