from __future__ import annotations

from typing import Any

import pytest

from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.reports.attack_results import AttackResult, make_result
from lit_unlearn.reports.attack_tables import attacks_markdown, by_label


def result(shown: int, concept: str = "dog", controls: Any = None, **settings: Any) -> AttackResult:
    verdicts = {"pre_attack": [False] * 4, "shown": [True] * shown + [False] * (4 - shown), "unedited": [True] * 4}
    numbers: dict[str, Any] = {"pictures": 4, "seconds": 2.0, "unet_forwards": 100, "unet_backwards": 0, "found": "x"}
    settings = {"run_guidance_scale": 4.0, "guidance_scale": 4.0, **settings}
    return make_result(
        verdicts=verdicts, controls=controls, attack="noise_probe", concept=concept, settings=settings, **numbers
    )


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_other_settings_are_not_averaged_with_the_runs_own() -> None:
    results = [result(4), result(2, seed=1), result(0, guidance_scale=1.0), result(1, negative_prompt="a|b")]
    assert list(by_label(results)) == ["noise_probe", "noise_probe, guidance 1", "noise_probe, negative prompt 'a|b'"]
    _, _, own, guidance, negative = rows(attacks_markdown({"uce": results}))
    assert own[:4] == ["uce", "noise probe", "2", "0.000"]  # two seeds
    assert own[4].startswith("0.750 (")
    low, high = wilson_interval(0, 4)
    assert guidance[1:5] == ["noise probe, guidance 1", "1", "0.000", f"0.000 ({low:.2f}–{high:.2f})"]
    assert negative[1] == "noise probe, negative prompt 'a&#124;b'"
    assert len(negative) == len(own)


@pytest.mark.parametrize("controlled", [True, False])
def test_controls_have_a_column_if_there_are_some(controlled: bool) -> None:
    first = {"empty prompt": [True, False], "target prompt": [False, False], "other": []} if controlled else None
    second = {"empty prompt": [True]} if controlled else None
    results = [result(4, controls=first), result(2, "cat", controls=second)]
    head, line, own, esd = rows(attacks_markdown({"uce": results, "esd": [result(1)]}))
    assert ("control" in head) == controlled
    assert len(head) == len(line) == len(own) == len(esd) == (9 if controlled else 8)
    if controlled:
        assert (own[head.index("control")], esd[head.index("control")]) == ("0.750", "-")
    assert own[head.index("unedited")] == "1.000"
