"""Benchmarks are not run by the tests, so what they import from the package is checked by name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_imports_what_the_package_has(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = [
        (node.module, name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_unlearn")
        for name in node.names
    ]
    assert not [f"{module}.{name}" for module, name in wanted if not has(module, name)]


def has(module: str, name: str) -> bool:
    """Whether ``from module import name`` works, for a name in the module or a module below it."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None
