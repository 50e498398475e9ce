"""The notebooks in ``examples`` run to the end, and their results are what their text says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def text_of(cell: dict[str, Any]) -> str:
    """What a cell printed."""
    return "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [cell for cell in content["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert path.stat().st_size < 200_000


@pytest.mark.slow
def test_the_first_edit(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (path,) = (path for path in EXAMPLES if path.stem == "first_edit")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(text_of(cell) for cell in cells)
    shares = {name: float(after) for name, after in re.findall(r"(forget|retain): .* before, ([\d.]+) after", printed)}
    assert shares["forget"] >= 0.9
    assert shares["retain"] >= 0.95
    assert "Warning" not in printed
    assert re.search(r"delta.safetensors: \d+ kB", printed)
    assert list(tmp_path.rglob("delta.safetensors"))
