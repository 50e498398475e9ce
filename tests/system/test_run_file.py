from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_unlearn.system.run_file import read_run, unfinished


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state": "finished"}, None),
        ({"state": "running"}, "is not finished"),
        (
            {"state": "stopped", "stopped": "after 2 of 4 steps, by trainer.max_steps=2"},
            "is not finished: it ended after 2 of 4 steps, by trainer.max_steps=2",
        ),
        ({}, None),  # of an earlier version
    ],
)
def test_what_is_said_of_a_run(content: dict[str, str], said: str | None, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    assert unfinished(tmp_path) == said


def test_a_folder_without_a_readable_file_says_nothing(tmp_path: Path) -> None:
    assert read_run(tmp_path) == {} and unfinished(tmp_path) is None
    (tmp_path / "run.json").write_text("[", encoding="utf-8")
    assert read_run(tmp_path) == {} and unfinished(tmp_path) is None
