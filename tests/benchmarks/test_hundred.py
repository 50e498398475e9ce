"""The bench of a hundred concepts: what its fits are counted to cost, on a tiny model; seconds are not asserted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import hundred
import pytest

CASES = {case.key: case for case in hundred.CASES}
PAIRS, NAMES, KEPT = 300, 122, 200


@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident size is reset as Linux allows it")
@pytest.mark.filterwarnings("ignore:The prompt .* tokens:UserWarning", "ignore:no --concept is given")
@pytest.mark.parametrize(
    ("key", "prompts"),
    [
        ("uce_names", NAMES + KEPT + 1),  # and the empty guide
        ("uce_prompts", 2 * PAIRS + KEPT + 1),  # and the empty prompt, which is preserved
        ("null_space_direct", 2 * PAIRS + 2 * KEPT),  # what is retained again after the edit, to say how it changed
        ("null_space_unet", 2 * PAIRS + KEPT + 3),  # and the empty prompt, for the null space and for pictures
        ("speed_names", NAMES + KEPT + 2),  # and the empty anchor; all positions of the empty prompt
    ],
)
def test_each_text_is_encoded_once(
    key: str, prompts: int, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "costs.json"
    case = CASES[key]
    if "null_space" in key or "speed" in key:  # 32 inputs are too few for the null space of so many texts
        case = replace(case, edit={**case.edit, "rule": "count", "threshold": 12})
    hundred.run_fit(case, tiny_sd, tmp_path, output)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["encodes"] == prompts
    assert found["memory_gb"] >= 0


def test_the_table_compares_with_the_case_beside() -> None:
    costs = {"encodes": 1001, "positions": 77, "factorised": 3, "forwards": 0, "memory_gb": 0.5}
    text = hundred.table({"uce_prompts": {"seconds": 10.0, **costs}, "null_space_direct": {"seconds": 15.0, **costs}})
    line = (
        "| null space direct, last layer, edit prompts | 15.0 | 1.50 of UCE, edit prompts | 2 | 1,001 | 77 | 3 | 0.50 |"
    )
    assert line in text
    assert "| UCE, edit prompts | 10.0 |  |  |" in text
