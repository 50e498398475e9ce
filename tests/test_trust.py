"""Nowhere is a file unpickled with trust."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lit_unlearn.edits import archives

ROOT = Path(__file__).parents[1]


def trusting_calls(source: str) -> list[int]:
    """Lines that unpickle with trust: ``torch.load`` without ``weights_only=True``, ``pickle.load``, unsafe YAML."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported = {(node.module, alias.name) for alias in node.names}
            if imported & {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}:
                lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        trusting = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "yaml.unsafe_load"}
        options = {("allow_pickle", "True"), ("trust_remote_code", "True")}
        unchecked = name == "torch.load" and given.get("weights_only") != "True"
        if unchecked or name in trusting or options & set(given.items()):
            lines.append(node.lineno)
    return lines


def test_nothing_is_loaded_with_trust() -> None:
    files = [path for folder in ("lit_unlearn", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {str(path): lines for path in files if (lines := trusting_calls(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=flag)", True),
        ("torch.load(path, weights_only=True)", False),
        ("from torch import load", True),
        ("pickle.loads(data)", True),
        ("numpy.load(path, allow_pickle=True)", True),
        ("json.loads(data)", False),
    ],
)
def test_a_trusting_call_is_seen(source: str, found: bool) -> None:
    assert bool(trusting_calls(source)) is found


def test_only_archives_reads_checkpoints() -> None:
    """One place to keep safe."""
    readers = [p for p in (ROOT / "lit_unlearn").rglob("*.py") if "torch.load(" in p.read_text(encoding="utf-8")]
    assert readers == [Path(archives.__file__)]
