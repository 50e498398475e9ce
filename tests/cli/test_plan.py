"""``lit-unlearn plan``."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_unlearn.cli import main


def test_a_plan_is_printed(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", "--config", "null_space_context", "--model", str(tiny_sd), "--concept", "dog"]
    assert main([*args, "--model.dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for text in ("ContextEdit on", "no weights were read", "attn2.to_k", "(the recipe: bfloat16)", "offload", "solves"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "plan: give a recipe, such as --config null_space_context.yaml"),
        (["--config", "nul_space"], "There is no recipe 'nul_space'"),
        (["--config", "null_space", "--modle", "x"], "modle"),
        (["--config", "null_space", "--model", "someone/unknown"], "its architecture is not known: give a folder"),
    ],
)
def test_what_is_wrong_is_said(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *args]) == 2
    assert message in capsys.readouterr().err
