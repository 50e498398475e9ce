from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.evaluation.scores import ConceptScore, Cost, Measurement, Part, Scores, Source
from lit_unlearn.reports import report
from lit_unlearn.reports.attack_results import AttackReport, make_result
from lit_unlearn.reports.report import collect, group, paper_markdown, report_csv, report_html, report_markdown
from lit_unlearn.reports.report_figures import heat_map_figure, pareto_front, robustness_figure, tradeoff_figure
from lit_unlearn.reports.summary import summarise

SCORES = {"uce": {"dog": (1.0, 0.9), "cat": (0.5, 1.0)}, "esd": {"dog": (0.8, 0.95), "cat": (0.9, 0.9)}}


def scores(method: str, edited: list[str], forget: float, retain: float, **changes: Any) -> Scores:
    intervals = {
        "forget": wilson_interval(round(20 * forget), 20),
        "retain": wilson_interval(round(100 * retain), 100),
        "harmonic_mean": (0.0, 1.0),
    }
    parts = {"direct": Part(forget, retain), "indirect": Part(forget, retain)}
    per_concept = {name: ConceptScore(1 - forget, 20, 0, True) for name in edited}
    before = Measurement(
        forget=0.0, retain=1.0, harmonic_mean=0.0, intervals=intervals, per_concept=per_concept,
        direct=Part(0.0, 1.0), indirect=Part(0.0, 1.0),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "method": method, "edited": edited, "forget": forget, "retain": retain,
        "harmonic_mean": 2 * forget * retain / (forget + retain), "intervals": intervals, **parts,
        "per_concept": per_concept, "adjacent": retain, "adversarial": forget, "err": 0.5,
        "backbone": Source("emoji-sd"), "concepts": Source("emoji20", "aa"), "judge": "emoji-cnn",
        "images_per_concept": 20, "seed": 0, "before": before, "cost": Cost(12.0, 340, 10**9, 40),
        "edit": {"weight_change_ratio": 0.1, "weight_change_norm": 2.0}, "drift": {"rmse": 0.02, "pictures": 90},
    }  # fmt: skip
    return Scores(**{**fields, **changes})


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two methods, each on two concepts and on both at once; one run was attacked."""
    root = tmp_path / "logs"
    for method, concepts in SCORES.items():
        for name, values in concepts.items():
            scores(method, [name], *values).save(root / method / name / "version_0" / "scores.json")
        scores(method, ["dog", "cat"], 0.6, 0.8).save(root / method / "dog+cat" / "version_0" / "scores.json")
    folder = root / "uce" / "dog" / "version_0"
    Image.new("RGB", (40, 20), "red").save(folder / "grid.png")
    verdicts = {"pre_attack": [True, *[False] * 9], "shown": [True, True, True, False], "unedited": [True] * 10}
    attack = make_result(
        verdicts=verdicts, attack="concept_inversion", concept="dog", pictures=10, seconds=60.0, unet_forwards=900,
        unet_backwards=300, found="a token",
    )  # fmt: skip
    AttackReport(method="uce", concepts=["dog"], checkpoint="last.ckpt", attacks=[attack]).save(folder / "attacks.json")
    return root


def test_crosswise_is_shown_where_several_concepts_are_edited(logs: Path) -> None:
    assert not any("rosswise" in text for text in (report_markdown(collect([logs])), report_html(collect([logs]))))
    assert "forget_crosswise" not in report_csv(collect([logs]))
    intervals = {"forget": (0.0, 1.0), "forget_crosswise": (0.2, 0.3), "harmonic_mean": (0.0, 1.0)}
    several = scores("uce", ["owl", "cat"], 1.0, 0.8, crosswise=0.25, intervals=intervals)
    several.save(logs / "uce" / "owl+cat" / "version_0" / "scores.json")
    runs = collect([logs])
    text = report_markdown(runs)
    alone, together = text.split("## 2 concepts at once")
    assert "| crosswise |" in together and "| crosswise |" not in alone
    (head,) = [line for line in together.splitlines() if "| crosswise |" in line]
    (line,) = [line for line in together.splitlines() if line.startswith("| uce | 2 |")]
    assert line.split(" | ")[head.split(" | ").index("crosswise")].startswith("0.250")
    assert "Two concepts that have changed places are forgotten" in text
    assert "Two concepts that have changed places are forgotten" in report_html(runs)
    rows = list(csv.DictReader(io.StringIO(report_csv(runs))))
    assert [row["forget_crosswise"] for row in rows if row["edited"] in ("owl+cat", "dog")] == ["", "", "0.25"]


def test_limits_are_shown_where_runs_have_them(logs: Path) -> None:
    runs = collect([logs])
    assert "| reach |" not in report_markdown(runs) and "| spontaneous |" not in report_markdown(runs)
    old = scores("uce", ["owl"], 1.0, 0.8)
    before = dataclasses.replace(old.before, spontaneous=0.125)
    edit = {**old.edit, "reach": 0.375}
    new = scores("uce", ["owl"], 1.0, 0.8, spontaneous=0.25, before=before, edit=edit)
    new.save(logs / "uce" / "owl" / "version_0" / "scores.json")
    runs = collect([logs])
    text, page = report_markdown(runs), report_html(runs)
    for column, value in (("spontaneous", "0.250"), ("reach", "0.375")):
        head, line = next(
            (head, line)
            for head in text.splitlines()
            if f"| {column} |" in head
            for line in text.partition(head)[2].splitlines()
            if line.startswith("| uce |")
        )
        assert line.split(" | ")[head.split(" | ").index(column)].startswith(value)
        assert f"<th>{column}</th>" in page
    assert "unedited | 3 |" in text and "0.125" in text
    for said in ("Spontaneous: pictures of retained prompts that show an edited concept", "does not mean that"):
        assert said in text and said in page
    (row,) = [row for row in csv.DictReader(io.StringIO(report_csv(runs))) if row["edited"] == "owl"]
    assert (row["reach"], row["spontaneous"], row["spontaneous_unedited"]) == ("0.375", "0.25", "0.125")


def test_runs_are_found_and_sorted_by_the_number_of_their_concepts(logs: Path) -> None:
    runs = collect([logs, logs / "uce"])
    assert len(runs) == 6
    groups = group(runs)
    assert [(part.number, len(part.runs), list(part.methods)) for part in groups] == [
        (1, 4, ["esd", "uce"]),
        (2, 2, ["esd", "uce"]),
    ]
    assert groups[0].attacks == {"uce": {"concept_inversion": 0.75}}
    unedited = groups[0].unedited
    assert unedited is not None
    assert (unedited.scores["forget"], unedited.runs) == (0.0, 2)  # each concept's pictures once


def test_markdown_and_csv_hold_the_numbers(logs: Path) -> None:
    runs = collect([logs])
    text = report_markdown(runs)
    assert "## One concept at a time" in text
    assert "## 2 concepts at once" in text
    assert re.search(r"^\| uce \| 2 \| 0\.750 \(0\.50–1\.00\) ", text, flags=re.MULTILINE)
    low, high = wilson_interval(3, 4)
    shown = f"0.750 ({low:.2f}–{high:.2f})"
    assert f"| uce | concept inversion | 1 | 0.100 | {shown} | 1.000 | 60 | 900 |" in text
    rows = list(csv.DictReader(io.StringIO(report_csv(runs))))
    assert len(rows) == 6
    found = {(row["method"], row["edited"]): row for row in rows}
    for method, concepts in SCORES.items():
        for name, (forget, retain) in concepts.items():
            row = found[method, name]
            assert (float(row["forget"]), float(row["retain"])) == (forget, retain)
            assert float(row["forget_low"]) == wilson_interval(round(20 * forget), 20)[0]
    assert float(found["uce", "dog"]["attack_concept_inversion"]) == 0.75
    assert found["esd", "dog"]["attack_concept_inversion"] == ""


def test_the_protocol_says_how_well_the_judge_tells_concepts(logs: Path) -> None:
    assert "Average precision" not in report._protocol_line(collect([logs]))
    numbers = {"recall": 1.0, "false_yes": 0.0, "positives": 20, "negatives": 60, "failed": 0}
    found = {
        name: {**numbers, "average_precision": value} for name, value in (("owl", 0.9), ("cat", 1.0), ("dog", None))
    }
    run = scores("uce", ["owl", "cat", "dog"], 1.0, 1.0, calibration=found)
    run.save(logs / "uce" / "owl+cat+dog" / "version_0" / "scores.json")
    line = "Average precision of the judge on unedited pictures, 2 concepts: 0.900 to 1.000."
    assert line in report._protocol_line(collect([logs]))


def test_the_page_needs_no_network(logs: Path) -> None:
    page = report_html(collect([logs]))
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": "llava"}, r"judge is 'emoji-cnn' in .* and 'llava' in .*/version_9"),
        ({"images_per_concept": 10}, "images_per_concept is 20 in"),
        ({"concepts": Source("paper20", "bb")}, "concepts is 'emoji20' in .* and 'paper20'"),
        ({"concepts": Source("emoji20", "bb")}, "'emoji20' in .*version_9 with other content"),
    ],
)
def test_runs_of_other_protocols_are_refused(change: dict[str, Any], message: str, logs: Path) -> None:
    scores("uce", ["owl"], 1.0, 1.0, **change).save(logs / "uce" / "owl" / "version_9" / "scores.json")
    with pytest.raises(ValueError, match=message):
        collect([logs])


def test_what_is_no_set_of_runs(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no folder .*nothing"):
        collect([tmp_path / "nothing"])
    with pytest.raises(ValueError, match=r"empty holds no scores\.json"):
        collect([logs, tmp_path / "empty"])
    (logs / "uce/dog/version_0/attacks.json").write_text(json.dumps({"attacks": [{"attack": "x"}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"attacks\.json has schema None, this version reads schema 1"):
        collect([logs])


def test_pareto_front_equals_brute_force() -> None:
    assert pareto_front([(0.0, 1.0), (1.0, 0.5), (0.5, 0.4), (0.5, 0.9), (0.5, 0.9)]) == [0, 3, 1]
    assert pareto_front([(1.0, 1.0), (0.9, 1.0), (1.0, 0.9)]) == [0]
    assert pareto_front([]) == []


def test_figures_show_what_they_are_given(logs: Path) -> None:
    part = group(collect([logs]))[0]
    summaries = part.summaries
    (axes,) = tradeoff_figure(summaries).axes
    places = [bars.lines[0].get_xydata()[0].tolist() for bars in axes.containers]  # type: ignore[attr-defined]
    assert places == [[s.scores["forget"], s.scores["retain"]] for s in summaries]
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"uce", "esd", "Pareto front"}
    (axes,) = robustness_figure(summaries, part.attacks).axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}  # type: ignore[attr-defined]
    assert heights["direct"] == pytest.approx([s.scores["forget_direct"] for s in summaries])
    assert math.isnan(heights["concept inversion"][0])  # esd was not attacked
    assert heights["concept inversion"][1] == pytest.approx(0.25)
    axes = heat_map_figure({"uce": {"dog": 0.5}, "esd": {"cat": 1.0}}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.50", "1.00"]


def test_the_paper_s_tables_stand_beside_the_challenge_s() -> None:
    text = paper_markdown()
    assert "| BlueJay | 0.100 / 0.808 |" in text
    assert re.search(r"\| BlueJay .* \| 0\.509 \| 0\.493 \| 0\.461 \|", text)
    assert re.search(r"\| LabradorRetriever .* \| - \| - \| - \|", text)
    # Both harmonic means of the paper's method; the second from its Tables 1 to 4.
    assert re.search(r"harmonic mean of the averages .* 0\.642 \|", text)
    assert re.search(r"average of the harmonic means .* 0\.582 \|", text)


@pytest.mark.slow
def test_a_person_sees_tables_figures_and_pictures(browser: Any, logs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_html(collect([logs])), encoding="utf-8")
    browser.get(page.as_uri())
    headings = [element.text for element in browser.find_elements("css selector", "h2")]
    assert headings == ["One concept at a time", "2 concepts at once"]
    tables = browser.find_elements("css selector", "table")
    rows = [row.text.split() for row in tables[0].find_elements("css selector", "tbody tr")]
    assert [row[0] for row in rows] == ["unedited", "esd", "uce"]
    assert summarise([run.scores for run in collect([logs / "uce"]) if len(run.scores.edited) == 1]).scores[
        "forget"
    ] == float(rows[2][2])
    figures = browser.find_elements("css selector", "figure svg")
    assert len(figures) >= 7
    for figure in figures:
        assert figure.size["width"] > 200
        assert figure.size["height"] > 100
    loaded = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert loaded == [40]
    # Nothing wider than the window makes the whole page scroll sideways.
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_runs_that_are_not_finished_are_named(logs: Path) -> None:
    folder = next(iter(sorted(logs.rglob("scores.json")))).parent
    said = f"{folder.as_posix()} is not finished: it ended after 1 of 40 steps, by trainer.max_steps=1."
    assert said not in report_markdown(collect([logs]))
    state = {"state": "stopped", "stopped": "after 1 of 40 steps, by trainer.max_steps=1"}
    (folder / "run.json").write_text(json.dumps(state), encoding="utf-8")
    assert said in report_markdown(collect([logs]))
    assert said in report_html(collect([logs]))
