"""Bars, on a terminal and in a notebook."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from lit_unlearn.system import environment, progress
from lit_unlearn.training import terminal


def test_a_bar_of_a_notebook_is_text_that_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with progress.progress("Drawing", 2) as advance:
        assert advance() is None  # a hook that returns something replaces what a module returns
        advance()
    said = capsys.readouterr().err
    assert "Drawing:   0%" in said
    assert "0/2" in said


def test_a_fit_in_a_notebook_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.progress_bars(None, []) == []  # nobody is looking
    monkeypatch.setattr(terminal, "in_notebook", lambda: True)
    (bar,) = terminal.progress_bars(None, [])
    assert isinstance(bar, terminal.NotebookProgress)
    assert terminal.progress_bars(False, []) == []
    assert terminal.progress_bars(None, [bar]) == []


def test_variables_that_are_set_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    environment.prepare_libraries()
    assert environment.os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert environment.os.environ["DIFFUSERS_VERBOSITY"] == "error"
