"""Classes read from source files agree with the classes that are imported."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest

from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.judges.load import shipped_judges
from lit_unlearn.judges.names import short_names
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system import sources
from lit_unlearn.system.errors import options
from lit_unlearn.system.sources import SourceClasses, arguments_of, our_classes, trainer_options


@pytest.mark.parametrize("cls", [UCE, ValueRefinement, NullSpace, ConceptPrompts])
def test_arguments_are_those_of_the_class(cls: type) -> None:
    found = arguments_of(cls.__name__)
    assert found is not None
    assert set(found) - {"args"} == set(options(cls)) - {"args"}
    assert our_classes()[cls.__name__].module == cls.__module__


def test_defaults_and_helps_are_read() -> None:
    threshold = (arguments_of("NullSpace") or {})["threshold"]
    default = inspect.signature(NullSpace).parameters["threshold"].default
    assert threshold.default == repr(default)
    assert threshold.help


def test_the_trainer_has_its_arguments() -> None:
    assert set(trainer_options()) == set(inspect.signature(L.Trainer).parameters)


def test_a_class_that_is_not_ours_has_no_known_arguments() -> None:
    assert arguments_of("Adam") is None


def test_short_names_of_judges_are_those_of_their_classes() -> None:
    assert short_names() == sorted(shipped_judges())


def test_only_the_files_of_the_classes_asked_for_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def note(text: str) -> ast.Module:
        parsed.append(text)
        return ast.parse(text)

    texts = {"one.py": "class One: ...\nclass Both: ...", "two.py": '"""\nclass One of many\n"""\nclass Both(One): ...'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(sources, "_module", lambda file: file.stem)
    monkeypatch.setattr(sources, "ast", SimpleNamespace(**{**vars(ast), "parse": note}))
    classes = SourceClasses(tmp_path / name for name in texts)
    assert ("Other" in classes, parsed) == (False, [])
    assert classes["Both"].module == "two"
    assert parsed == [texts["two.py"]]
    assert classes["One"].module == "one"  # what a docstring says is none
    assert {name: cls.module for name, cls in classes.items()} == {"One": "one", "Both": "two"}
    assert len(parsed) == len(texts)
