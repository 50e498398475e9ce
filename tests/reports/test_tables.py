from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lit_unlearn.evaluation.metrics import harmonic_mean
from lit_unlearn.evaluation.scores import ConceptScore, Measurement, Part, Scores, Source
from lit_unlearn.reports.tables import concepts_markdown, scores_table, summary_markdown


def run(forget: float | None, retain: float, concept: str = "dog", **changes: Any) -> Scores:
    per_concept = {
        "apple": ConceptScore(share_with_concept=0.95, n=20, missing=0, edited=False),
        concept: ConceptScore(share_with_concept=0.05, n=19, missing=1, edited=True, failed=1),
        "rain [wet]": ConceptScore(share_with_concept=None, n=0, missing=20, edited=False),
    }
    arguments: dict[str, Any] = {
        "forget": forget,
        "retain": retain,
        "harmonic_mean": None if forget is None else harmonic_mean(forget, retain),
        "intervals": {"forget": (0.75, 0.99), "retain": (0.81, 0.98), "harmonic_mean": (0.7, 0.99)},
        "direct": Part(0.91, 0.92),
        "indirect": Part(0.83, 0.84),
        "per_concept": per_concept,
        "method": "null_space",
        "backbone": Source("emoji-sd"),
        "concepts": Source("emoji20", "1" * 64),
        "edited": [concept],
        "judge": "emoji-cnn-1",
        "images_per_concept": 20,
        "seed": 0,
    }
    return Scores(**{**arguments, **changes})


def before(scores: Scores) -> Measurement:
    values = {f.name: getattr(scores, f.name) for f in dataclasses.fields(Measurement)}
    per_concept = {"dog": ConceptScore(share_with_concept=0.98, n=20, missing=0, edited=True)}
    return Measurement(**{**values, "forget": 0.02, "per_concept": per_concept})


def printed(table: Table, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def row(lines: list[str], start: str) -> list[str]:
    (line,) = [line for line in lines if line.strip().startswith(start)]
    return line.split()


def test_the_limits_of_an_edit_have_rows() -> None:
    intervals = {"spontaneous": (0.0, 0.2)}
    scores = run(0.9, 0.8, spontaneous=0.125, intervals=intervals, edit={"reach": 0.25})
    unedited = dataclasses.replace(before(scores), spontaneous=0.5)
    lines = printed(scores_table(unedited, scores))
    assert row(lines, "spontaneous rate") == ["spontaneous", "rate", "0.500", "(0.00-0.20)", "0.125", "(0.00-0.20)"]
    assert row(lines, "reach") == ["reach", "0.250"]
    assert not [line for line in printed(scores_table(None, run(0.9, 0.8))) if "reach" in line or "spont" in line]
    assert row(printed(scores_table(None, scores), width=80), "reach") == ["reach", "0.250"]


def test_several_edited_concepts_have_a_column_of_their_own() -> None:
    def measured(share: float) -> dict[str, ConceptScore]:
        edited = {name: ConceptScore(0.0, 20, 0, True, share_crosswise=share) for name in ("dog", "cat")}
        return {**edited, "owl": ConceptScore(1.0, 20, 0, False)}

    intervals = {"forget_crosswise": (0.0, 0.2)}
    scores = run(0.9, 0.8, edited=["dog", "cat"], per_concept=measured(1.0), crosswise=0.0, intervals=intervals)
    unedited = dataclasses.replace(before(scores), per_concept=measured(0.25), crosswise=0.75)
    lines = printed(scores_table(unedited, scores))
    assert "crosswise judged" in " ".join(" ".join(lines).split())
    assert row(lines, "dog (edited)") == ["dog", "(edited)", "0.00", "0.00", "0.25", "→", "1.00", "20/20"]
    assert row(lines, "owl") == ["owl", "1.00", "1.00", "20/20"]
    assert row(lines, "forget, crosswise") == ["forget,", "crosswise", "0.750", "(0.00-0.20)", "0.000", "(0.00-0.20)"]
    assert "crosswise" not in " ".join(printed(scores_table(None, run(0.9, 0.8))))


def test_the_edited_concept_comes_first_with_both_shares() -> None:
    scores = run(0.9, 0.8)
    lines = printed(scores_table(before(scores), scores))
    assert row(lines, "dog (edited)")[-3:] == ["0.98", "0.05", "19/20"]
    assert row(lines, "apple")[-3:] == ["-", "0.95", "20/20"]
    assert row(lines, "rain [wet]")[-3:] == ["-", "-", "0/20"]
    order = [next(i for i, line in enumerate(lines) if name in line) for name in ("dog (edited)", "apple", "rain")]
    assert order == sorted(order)


def test_scores_have_intervals_and_direct_and_indirect_stand_apart() -> None:
    scores = run(0.9, 0.8)
    lines = printed(scores_table(before(scores), scores))
    assert row(lines, "forget  ")[1:] == ["0.020", "(0.75-0.99)", "0.900", "(0.75-0.99)"]
    assert row(lines, "harmonic mean")[-2:] == ["0.847", "(0.70-0.99)"]
    assert row(lines, "forget, indirect")[-2:] == ["0.830", "0.830"]
    assert row(lines, "retain, direct")[-1] == "0.920"
    assert "21 pictures have no verdict" in " ".join(lines)
    assert "null_space: dog" in lines[0]


def test_without_a_measurement_before_there_is_one_column() -> None:
    lines = printed(scores_table(None, run(None, 0.8)))
    assert row(lines, "apple")[1:] == ["0.95", "20/20"]
    assert row(lines, "forget  ") == ["forget", "-"]
    assert not any("before" in line for line in lines)


def test_nothing_is_cut_on_a_terminal_of_80_columns() -> None:
    scores = run(0.9, 0.8)
    lines = printed(scores_table(before(scores), scores), width=80)
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    assert sum("(0.75-0.99)" in line for line in lines) == 1


def test_summary_is_the_paper_s_table_with_both_harmonic_means() -> None:
    text = summary_markdown([run(0.0, 0.8, "cat"), run(1.0, 0.8, "dog")])
    assert text.splitlines() == [
        "| Concept | Forget | Retain | HM |",
        "| --- | ---: | ---: | ---: |",
        "| cat | 0.000 | 0.800 | 0.000 |",
        "| dog | 1.000 | 0.800 | 0.889 |",
        "| **Average** | 0.500 | 0.800 | 0.444 |",
        "| **Harmonic mean of the averages** |  |  | 0.615 |",
    ]


def test_summary_keeps_methods_and_seeds_apart() -> None:
    text = summary_markdown([run(0.9, 0.8, seed=0), run(0.7, 0.8, seed=1), run(0.5, 0.8, method="uce")])
    assert text.index("### null_space") < text.index("| dog (seed 0) | 0.900") < text.index("| dog (seed 1) | 0.700")
    assert text.index("### uce") < text.index("| dog | 0.500")
    assert "| **Average** | 0.800 | 0.800 |" in text


def test_summary_says_when_an_average_leaves_a_run_out() -> None:
    text = summary_markdown([run(None, 0.2, "cat"), run(0.9, 0.8, "dog")])
    assert "| cat | - | 0.200 | - |" in text
    assert "| **Average of 1 of 2** | 0.900 | 0.800 |" in text


def test_summary_refuses_other_protocols_and_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"judge is \"emoji-cnn-1\" for dog \(null_space\) but \"llava\" for dog \(uce\)"
    ):
        summary_markdown([run(0.9, 0.8), run(0.9, 0.8, judge="llava", method="uce")])
    with pytest.raises(ValueError, match="concepts is"):
        summary_markdown([run(0.9, 0.8), run(0.9, 0.8, concepts=Source("emoji20", "2" * 64))])
    with pytest.raises(ValueError, match="no scores"):
        summary_markdown([])


def test_a_row_per_concept_with_means_over_seeds() -> None:
    runs = [
        run(0.9, 0.8, seed=0),
        run(0.7, 0.8, seed=1),
        run(0.5, 0.8, method="uce"),
        dataclasses.replace(run(1.0, 0.8, "cat"), retain=None),
    ]
    text = concepts_markdown(runs).splitlines()
    assert text[0] == "| concept | null_space | uce |"
    assert text[2:] == ["| dog | 0.80 / 0.80 | 0.50 / 0.80 |", "| cat | 1.00 / - | - |"]


def test_the_column_of_several_edited_concepts_fits_into_80_characters() -> None:
    per_concept = {name: ConceptScore(0.0, 100, 0, True, share_crosswise=1.0) for name in ("soccer ball", "cat")}
    intervals = {name: (0.5, 0.9) for name in ("forget", "retain", "forget_crosswise")}
    scores = run(1.0, 0.9, per_concept=per_concept, intervals=intervals, crosswise=0.0)
    lines = printed(scores_table(scores, scores), width=80)
    assert row(lines, "cat (edited)")[-4:] == ["1.00", "→", "1.00", "100/100"]
    assert [line.split()[-2:] for line in lines if "judged" in line][-1] == ["crosswise", "judged"]
