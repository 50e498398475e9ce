from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.reports.attack_results import AttackReport, AttackResult, attacks_table, make_result


def result(attack: str = "prompt_search", concept: str = "dog", shown: int = 3, **fields: Any) -> AttackResult:
    verdicts = {
        "pre_attack": [False] * 4,
        "shown": [True] * shown + [False] * (4 - shown),
        "unedited": [True] * 4,
    }
    defaults = {"pictures": 4, "seconds": 1.5, "unet_forwards": 100, "unet_backwards": 20, "found": "x y one dog"}
    return make_result(verdicts=verdicts, attack=attack, concept=concept, **{**defaults, **fields})


def report(*results: AttackResult) -> AttackReport:
    return AttackReport(method="esd", concepts=["dog", "soccer ball"], checkpoint="last.ckpt", attacks=list(results))


def test_shares_and_intervals_are_those_of_the_verdicts() -> None:
    made = result(shown=3)
    assert (made.pre_attack, made.shown, made.unedited) == (0.0, 0.75, 1.0)
    assert made.intervals["shown"] == wilson_interval(3, 4)
    assert made.intervals["unedited"] == wilson_interval(4, 4)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "attacks.json"
    written = report(result(settings={"steps": 3, "window": [0.3, 0.9]}), result("relearning", "soccer ball"))
    written.save(path)
    assert AttackReport.load(path) == written
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["schema", "method", "concepts", "checkpoint", "attacks"]
    assert content["schema"] == 1
    assert {"attack", "concept", "pictures", "pre_attack", "shown", "unedited", "intervals"} < set(
        content["attacks"][0]
    )


def test_results_of_the_same_attack_and_concept_are_replaced() -> None:
    first = report(result(shown=1), result("relearning"), result(concept="soccer ball"))
    merged = first.merged([result(shown=4), result("ring_a_bell")])
    assert [(r.attack, r.concept, r.shown) for r in merged.attacks] == [
        ("prompt_search", "dog", 1.0),
        ("relearning", "dog", 0.75),
        ("prompt_search", "soccer ball", 0.75),
        ("ring_a_bell", "dog", 0.75),
    ]
    assert merged.find("ring_a_bell", "dog") is not None
    assert first.find("ring_a_bell", "dog") is None


def test_results_of_other_settings_stand_beside_each_other(tmp_path: Path) -> None:
    def at(shown: int = 3, seed: int = 0, guidance_scale: float = 4.0, negative: str | None = None) -> AttackResult:
        settings = {"seed": seed, "guidance_scale": guidance_scale, "run_guidance_scale": 4.0}
        return result(shown=shown, settings={**settings, "negative_prompt": negative})

    variants = [at(), at(seed=1), at(guidance_scale=1.0), at(negative="a cat"), at(guidance_scale=1.0, negative="a")]
    merged = report().merged(variants)
    assert merged.attacks == variants
    again = at(0, guidance_scale=1.0)
    assert merged.merged([again]).attacks == [*variants[:2], again, *variants[3:]]
    assert merged.find("prompt_search", "dog", seed=1) == variants[1]
    assert merged.find("prompt_search", "dog", guidance_scale=1.0, negative_prompt="a") == variants[4]
    assert merged.find("prompt_search", "dog", guidance_scale=7.0) is None
    merged.save(tmp_path / "attacks.json")
    assert AttackReport.load(tmp_path / "attacks.json") == merged
    assert [each.label for each in variants] == [
        "prompt_search",
        "prompt_search",
        "prompt_search, guidance 1",
        "prompt_search, negative prompt 'a cat'",
        "prompt_search, guidance 1, negative prompt 'a'",
    ]
    twice = report(*variants, at(1, seed=1))
    twice.save(tmp_path / "twice.json")
    with pytest.raises(ValueError, match="prompt_search on dog is there twice"):
        AttackReport.load(tmp_path / "twice.json")


def test_files_of_earlier_versions_are_read_and_found(tmp_path: Path) -> None:
    path = tmp_path / "attacks.json"
    own = {"seed": 0, "guidance_scale": 4.0}
    report(result(settings=own)).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["attacks"][0]["controls"]  # of this version
    path.write_text(json.dumps(content), encoding="utf-8")
    (old,) = AttackReport.load(path).attacks
    assert (old.label, old.controls, old.control) == ("prompt_search", {}, None)
    loaded = AttackReport.load(path)
    assert loaded.find("prompt_search", "dog", **own, negative_prompt=None) == old
    assert loaded.find("prompt_search", "dog", seed=0, guidance_scale=1.0, negative_prompt=None) is None
    new = result(shown=1, settings={**own, "run_guidance_scale": 4.0, "negative_prompt": None})
    assert loaded.merged([new]).attacks == [new]


def test_controls_have_shares_and_intervals(tmp_path: Path) -> None:
    controls = {"target prompt": [True, False], "empty prompt": [True] * 3 + [False], "other": []}
    made = result(controls=controls)
    assert made.controls == {"target prompt": 0.5, "empty prompt": 0.75, "other": None}
    assert made.control == 0.75
    assert made.intervals["empty prompt"] == wilson_interval(3, 4)
    assert "other" not in made.intervals
    report(made).save(tmp_path / "attacks.json")
    assert AttackReport.load(tmp_path / "attacks.json").attacks == [made]
    damage(tmp_path / "attacks.json", controls={"empty prompt": 0.1})
    with pytest.raises(ValueError, match=r"empty prompt=0\.1 with the interval .* is no share"):
        AttackReport.load(tmp_path / "attacks.json")


def damage(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    target = content if "attacks" in changes or "schema" in changes else content["attacks"][0]
    for name, value in changes.items():
        target.pop(name) if value is None else target.update({name: value})
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, this version reads schema 1"),
        ({"shown": None}, r"attacks\.attacks\[0\] lacks the field 'shown'"),
        ({"shwon": 1.0}, "unknown field 'shwon'"),
        ({"shown": "all"}, r"attacks\.attacks\[0\]\.shown is 'all', expected float"),
        ({"shown": 1.5}, r"prompt_search on dog: shown=1\.5 with the interval .* is no share"),
        ({"intervals": {"shown": [0.9, 1.0]}}, r"shown=0\.75 with the interval \(0\.9, 1\.0\) is no share"),
        ({"concept": "owl"}, "prompt_search on owl: the concept was not edited"),
        ({"attack": "relearning"}, "relearning on dog is there twice"),
    ],
)
def test_a_file_that_is_not_valid(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "attacks.json"
    report(result(), result("relearning")).save(path)
    AttackReport.load(path)
    damage(path, **changes)
    with pytest.raises(ValueError, match=message):
        AttackReport.load(path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "has schema None"), (None, "There is no")]
)
def test_a_file_that_is_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "attacks.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AttackReport.load(path)


def test_the_table_says_that_failure_proves_nothing() -> None:
    def text(*results: AttackResult) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(attacks_table(results, "some run"))
        return capture.get()

    failed = text(result(shown=0), result("relearning"))
    assert "An attack that fails proves nothing" in failed
    assert "0.75 (0.30-0.95)" in failed
    assert "proves nothing" not in text(result())


def test_long_names_leave_room_for_the_numbers() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(attacks_table([result("relearning_others_rank16_all")], "some run"))
    text = capture.get()
    assert "0.75 (0.30-0.95)" in text
    assert "…" not in text


def test_the_table_has_controls_and_other_settings() -> None:
    def text(*results: AttackResult) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(attacks_table(results, "some run"))
        return capture.get()

    settings = {"guidance_scale": 1.0, "run_guidance_scale": 4.0}
    plain, other = result(), result("completion", controls={"empty prompt": [True] * 4}, settings=settings)
    assert "control" not in text(plain)
    assert "completion, guidance 1 " in text(plain, other)
    line = next(line for line in text(plain, other).splitlines() if "completion" in line)
    assert line.split()[3:7] == ["0.00", "0.75", "(0.30-0.95)", "1.00"]
    line = next(line for line in text(plain, other).splitlines() if "prompt_search" in line)
    assert line.split()[1:5] == ["0.00", "0.75", "(0.30-0.95)", "-"]

    def styles(*results: AttackResult) -> list[str]:
        column = attacks_table(results, "some run").columns[2]
        return [str(getattr(cell, "style", "")) for cell in column.cells]

    # What the control shows as well is not a success.
    assert styles(plain, other) == ["bold red", ""]
