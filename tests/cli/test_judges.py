"""Judges of ``fit`` and ``test``: what is refused before a model is loaded, and a judge of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_unlearn import cli
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.evaluation.scores import Scores

MINE = """
import torch


class Bright:
    def __init__(self, threshold: float = 0.5):
        self.name, self.threshold = f"bright {threshold}", threshold

    def __call__(self, images, questions):
        return (images.mean((1, 2, 3)) > self.threshold).float()


class Nameless(Bright):
    def __init__(self):
        pass
"""


@pytest.fixture
def mine(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, ``my_judges``."""
    (workplace / "my_judges.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # nothing else is to be written


@pytest.fixture
def unicorns(workplace: Path) -> str:
    """``emoji20`` with a question about dogs that no classifier knows."""
    content = yaml.safe_load(Path(load_concept_set("emoji20").path).read_text(encoding="utf-8"))
    content["concepts"]["dog"]["question"] = "Is there a unicorn in this picture?"
    (workplace / "unicorns.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return "unicorns.yaml"


def test_a_question_that_a_judge_does_not_know_is_refused(
    recipe: Path, unicorns: str, refuses: Callable[..., str]
) -> None:
    args = ["fit", "--config", str(recipe), "--model.concept_set", unicorns]
    asks = "cannot answer 'Is there a unicorn in this picture?', which dog of emoji20 asks: take"
    assert asks in refuses(*args)
    assert f"judge='emoji' {asks} judge=clip or llava" in refuses(*args, "--model.judge", "emoji")
    message = refuses(*args, "--model.judge", "clip", "--model.second_judge", "emoji")
    assert message.startswith(f"second_judge='emoji' {asks} second_judge=clip or llava")


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.judge", "gpt"],
            "judge='gpt' is no judge and no folder: take clip, emoji, emoji_second, llava, nudenet, the",
        ),
        (
            ["--model.judge", "nudenet"],
            "judge='nudenet' cannot answer 'Is there an apple in this picture?' (it answers",
        ),
        (["--model.judge", "my_judges.Dark"], "judge='my_judges.Dark': my_judges has no class Dark"),
        (
            ["--model.judge", "my_judges.Bright", "--model.judge_options", "{limit: 1}"],
            "judge_options.limit is unknown",
        ),
        (["--model.second_judge_options", "{a: 1}"], "model.second_judge_options are of no judge: name one with"),
        (["--model.second_judge", "."], "second_judge='.' has no config.json"),
        (["--model.second_judge", "gpt"], "second_judge='gpt' is no judge and no folder"),
        (
            ["--model.second_judge", "clip", "--model.second_judge_options", "{batch_size: 0}"],
            "second_judge_options.batch_size=0 must be at least 1.",
        ),
        (["--model.judge", "clip", "--model.second_judge", "clip"], "model.second_judge='clip' is the judge itself"),
    ],
)
def test_a_judge_that_cannot_be_had_is_refused(
    command: str, args: list[str], message: str, recipe: Path, run_folder: Path, mine: None, refuses: Callable[..., str]
) -> None:
    assert message in refuses(command, "--config", str(recipe), *args)


def test_an_own_judge_tests_a_run_with_the_options_that_are_given(recipe: Path, run_folder: Path, mine: None) -> None:
    args = ["test", "--config", str(recipe), "--model.judge", "my_judges.Bright"]
    args += ["--model.second_judge", "my_judges.Bright", "--model.second_judge_options", "{threshold: 0.6}"]
    assert cli.main([*args, "--model.judge_options", "{threshold: 0.45}"]) == 0
    scores = Scores.load(run_folder / "scores.json")
    assert scores.judge == "bright 0.45"
    assert scores.agreement is not None
    assert scores.agreement["judge"] == "bright 0.6"


def test_what_a_checkpoint_says_of_judges_decides_nothing(recipe: Path, run_folder: Path, mine: None) -> None:
    ckpt_path = run_folder / "checkpoints/last.ckpt"
    checkpoint = torch.load(ckpt_path, weights_only=True)
    stored = {"judge": "evil.Judge", "judge_options": {"x": 1}, "second_judge": "evil.Judge", "judge_cache": "evil"}
    checkpoint["hyper_parameters"] |= stored
    torch.save(checkpoint, ckpt_path)
    assert cli.main(["test", "--config", str(recipe), "--model.judge", "my_judges.Bright"]) == 0
    assert Scores.load(run_folder / "scores.json").judge == "bright 0.5"
    assert not Path("evil").exists()
    assert json.loads((run_folder / "scores.json").read_text(encoding="utf-8"))["agreement"] is None


def test_a_judge_that_cannot_be_made_ends_a_test_in_one_sentence(
    recipe: Path, run_folder: Path, mine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["test", "--config", str(recipe), "--model.judge", "my_judges.Nameless"]) == 2
    assert "lit-unlearn: error: judge='my_judges.Nameless' has no name: set self.name" in capsys.readouterr().err
    assert not (run_folder / "scores.json").exists()
