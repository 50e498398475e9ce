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

from lit_unlearn import __version__
from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.evaluation.scores import ConceptScore, Cost, Measurement, Part, Scores, Source
from lit_unlearn.reports import report
from lit_unlearn.reports.attack_results import AttackReport, make_result
from lit_unlearn.reports.page import report_html
from lit_unlearn.reports.report import collect, find_runs, group, paper_markdown, report_csv, report_markdown
from lit_unlearn.reports.report_figures import (
    SIDE,
    SIDE_BY_SIDE,
    cost_figure,
    heat_map_figure,
    pareto_front,
    robustness_figure,
    tradeoff_figure,
)
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
    assert "Average precision" not in report.protocol_line(collect([logs]))
    numbers = {"recall": 1.0, "false_yes": 0.0, "positives": 20, "negatives": 60, "failed": 0}
    found = {
        name: {**numbers, "average_precision": value} for name, value in (("owl", 0.9), ("cat", 1.0), ("dog", None))
    }
    run = scores("uce", ["owl", "cat", "dog"], 1.0, 1.0, calibration=found)
    run.save(logs / "uce" / "owl+cat+dog" / "version_0" / "scores.json")
    line = "Average precision of the judge on unedited pictures, 2 concepts: 0.900 to 1.000."
    assert line in report.protocol_line(collect([logs]))


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


def test_runs_of_another_set_have_a_section_of_their_own(logs: Path) -> None:
    assert "### " in report_markdown(collect([logs])) and "Concept set" not in report_markdown(collect([logs]))
    others = {"concepts": Source("emoji20", "bb0123456789")}, {"judge": "llava", "images_per_concept": 1}
    for number, change in enumerate(others):
        scores("speed", ["owl"], 1.0, 1.0, **change).save(logs / "speed/owl" / f"version_{number}" / "scores.json")
    runs = find_runs([logs])
    text, page = report_markdown(runs), report_html(runs)
    titles = [
        "Concept set emoji20 (aa), judge emoji-cnn, 20 pictures per concept",
        "Concept set emoji20 (bb012345), judge emoji-cnn, 20 pictures per concept",
        "Concept set emoji20, judge llava, 1 picture per concept",
    ]
    assert "The runs are of 3 protocols, whose numbers do not compare" in text and "of 3 protocols" in page
    assert set(re.findall(r"^## (.*)$", text, flags=re.MULTILINE)) == set(titles)
    assert set(re.findall(r"<h2>(.*)</h2>", page)) == set(titles)
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}
    assert "### One concept at a time" in sections[titles[0]] and "| speed |" not in sections[titles[0]]
    for title in titles[1:]:
        assert "| speed | 1 |" in sections[title] and "| uce |" not in sections[title]
        assert "1 run on emoji-sd" in sections[title]
    rows = list(csv.DictReader(io.StringIO(report_csv(runs))))
    assert len(rows) == 8 and {row["concept_set"] for row in rows} == {"emoji20"}


def test_a_report_says_when_by_what_and_with_which_verdict(logs: Path) -> None:
    for method, forget, retain in (("good", 0.95, 0.98), ("bad", 0.5, 0.98), ("rough", 1.0, 0.6)):
        for name in ("dog", "owl"):
            change = {"per_concept": {name: ConceptScore(1 - forget, 20, 0, True)}}
            scores(method, [name], forget, retain, **change).save(logs / method / name / "version_0" / "scores.json")
    scores("alone", ["dog"], 0.95, 0.98, per_concept={"dog": ConceptScore(0.05, 20, 0, True)}).save(
        logs / "alone" / "dog" / "version_0" / "scores.json"
    )
    runs = collect([logs])
    text, page = report_markdown(runs), report_html(runs)
    for line in (
        "good: erased, and the others kept, in 2 of 2 runs. Not attacked.",
        "bad: erased, and the others kept, in 0 of 2 runs. Not erased: dog, owl. Not attacked.",
        "rough: erased, and the others kept, in 0 of 2 runs. Others not kept: dog, owl. Not attacked.",
        "uce: erased, and the others kept, in 0 of 2 runs. Not erased: cat. Others not kept: dog. "
        "The attack, concept inversion, shows the concept on 75% of the pictures.",
        "alone: Erased: the edited model shows dog on 1 of 20 pictures of its prompts, the unedited one on 1 of 20 "
        "(judge: emoji-cnn). Kept: other concepts are on 98.0% of their pictures, without the edit on 100.0%. "
        "Not attacked.",
    ):
        assert f"- {line}\n" in text
        assert f"<li>{line}</li>" in page
    made = rf"Made on \d{{4}}-\d\d-\d\d at \d\d:\d\d UTC by lit-unlearn {__version__}\."
    assert re.search(made, text) and re.search(made, page)


def test_one_is_not_written_as_several(logs: Path) -> None:
    numbers = {"recall": 1.0, "false_yes": 0.0, "positives": 20, "negatives": 60, "failed": 0}
    one = scores(
        "uce", ["owl"], 1.0, 1.0, images_per_concept=1, calibration={"owl": {**numbers, "average_precision": 1}}
    )
    one.save(logs / "alone" / "scores.json")
    text = report_markdown(collect([logs / "alone"]))
    assert "1 run on emoji-sd" in text and "1 picture per concept" in text and "1 concept: 1.000" in text
    assert not re.search(r"\b1 (runs|concepts|pictures|attacks)\b", text + report_html(collect([logs / "alone"])))


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


def shifts(axes: Any, artists: list[Any]) -> list[float]:
    """How far artists are drawn to the right of their data, in points."""
    zero = axes.transData.transform((0.5, 0.5))[0]
    return [(artist.transform((0.5, 0.5))[0] - zero) * 72 / axes.figure.dpi for artist in artists]


def test_equal_methods_stand_side_by_side(logs: Path) -> None:
    for method in ("speed", "memit"):  # as uce's
        for name, values in SCORES["uce"].items():
            scores(method, [name], *values).save(logs / method / name / "version_0" / "scores.json")
    summaries = group(collect([logs]))[0].summaries
    assert [summary.method for summary in summaries] == ["esd", "memit", "speed", "uce"]
    (axes,) = tradeoff_figure(summaries).axes
    lines = [bars.lines[0] for bars in axes.containers]  # type: ignore[attr-defined]
    assert shifts(axes, [line.get_transform() for line in lines]) == pytest.approx([0, -SIDE, 0, SIDE])
    assert lines[1].get_xydata().tolist() == lines[3].get_xydata().tolist()  # the data stay true
    legend = axes.get_legend()
    assert legend is not None and legend.get_title().get_text() == SIDE_BY_SIDE
    (axes,) = cost_figure(summaries).axes  # of equal costs; only esd has another harmonic mean
    axes.set_xscale("linear")
    moved = shifts(axes, [marker.get_offset_transform() for marker in axes.collections])
    assert moved == pytest.approx([0, -SIDE, 0, SIDE])
    (axes,) = tradeoff_figure([s for s in summaries if s.method in ("esd", "uce")]).axes
    assert axes.get_legend().get_title().get_text() == ""  # type: ignore[union-attr]


def test_not_attacked_is_written_and_not_drawn_as_nought(logs: Path) -> None:
    part = group(collect([logs]))[0]
    (axes,) = robustness_figure(part.summaries, part.attacks).axes
    (text,) = axes.texts  # esd's; uce was attacked
    assert (text.get_text(), round(text.get_position()[0])) == ("not attacked", 1)
    (axes,) = robustness_figure(part.summaries, {**part.attacks, "esd": {"prompt_search": 1.0}}).axes
    assert sorted(text.get_text() for text in axes.texts) == ["0", "not attacked", "not attacked"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 400])
def test_the_page_fits_a_window_and_a_phone(width: int, browser: Any, logs: Path, tmp_path: Path) -> None:
    long = "a_method_with_a_long_name_for_a_phone"
    scores(long, ["dog"], 1.0, 0.9).save(logs / long / "dog" / "version_0" / "scores.json")
    Image.new("RGB", (1600, 800), "red").save(logs / "uce" / "dog" / "version_0" / "grid.png")
    page = tmp_path / "report.html"
    page.write_text(report_html(collect([logs])), encoding="utf-8")
    # A window of Chromium is at least 500 pixels wide; a device is as wide as it says.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    inner, content = browser.execute_script(
        "const page = document.documentElement; return [page.clientWidth, page.scrollWidth]"
    )
    assert width - 20 <= inner == content <= width  # less a bar on the right
    boxes = "[...document.querySelectorAll('.wide')]"
    assert browser.execute_script(f"return {boxes}.every(b => b.getBoundingClientRect().right <= {width})")
    scrolls = browser.execute_script(f"return {boxes}.some(b => b.scrollWidth > b.clientWidth)")
    assert scrolls or width == 1300
    tops = browser.execute_script(
        "return [...document.querySelectorAll('.figures figure')].slice(0, 2).map(f => f.getBoundingClientRect().top)"
    )
    assert (tops[0] == tops[1]) is (width == 1300)  # two in a row fill the page
    widths = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(s => s.clientWidth)")
    assert min(widths) > 500  # wide enough to be read


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
