from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_unlearn.evaluation.metrics import ForgetRetain, wilson_interval
from lit_unlearn.evaluation.scores import SCHEMA, Cost, Measurement, Part, Relapse, Scores, Source
from lit_unlearn.system.json_files import write_json


def measure(probability_of_dog: float) -> dict[str, Any]:
    """Return computed scores of two concepts with a direct and an indirect prompt; one dog picture is not judged."""
    metric = ForgetRetain(["apple", "dog"], ["dog"], images_per_concept=4, num_direct=1, images_per_prompt=2)
    metric.update(torch.tensor([0.9, 0.9, 0.9, 0.1]), [0] * 4, [0, 0, 1, 1], [0, 1, 0, 1])
    metric.update(torch.tensor([probability_of_dog] * 3 + [math.nan]), [1] * 4, [0, 0, 1, 1], [0, 1, 0, 1])
    return metric.compute()


def example(**changes: Any) -> Scores:
    arguments: dict[str, Any] = {
        "method": "null_space",
        "backbone": Source("checkpoints/emoji-sd", "0" * 64),
        "concepts": Source("emoji20", "1" * 64),
        "edited": ["dog"],
        "judge": "emoji-cnn-1",
        "images_per_concept": 4,
        "seed": 3,
        "before": Measurement.from_metric(measure(0.9)),
        "cost": Cost(12.5, 340, None),
        "edit": {"layers": {"encoder.layers.1.mlp.fc2": {"null_space_dimension": 17, "leak": 1e-13}}},
    }
    return Scores.from_metric(measure(0.1), **{**arguments, **changes})


def test_scores_are_the_metric_s() -> None:
    scores = example()
    assert (scores.forget, scores.retain) == (1.0, 0.75)
    assert scores.harmonic_mean == pytest.approx(2 * 0.75 / 1.75)
    assert scores.direct == Part(1.0, 1.0)
    assert scores.indirect == Part(1.0, 0.5)
    dog = scores.per_concept["dog"]
    assert (dog.share_with_concept, dog.n, dog.missing, dog.failed, dog.edited) == (0.0, 3, 1, 1, True)
    assert scores.before is not None
    assert scores.before.forget == 0.0
    assert scores.intervals["forget"][0] < 1.0 == scores.intervals["forget"][1]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    for number, scores in enumerate((example(), example(before=None, cost=None, edited=[], drift={"psnr": 31.5}))):
        path = tmp_path / f"run{number}" / "scores.json"
        scores.save(path)
        assert Scores.load(path) == scores


def test_the_file_has_the_documented_fields(tmp_path: Path) -> None:
    example().save(tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["schema"] == SCHEMA == 1
    assert next(iter(content)) == "schema"
    assert set(content) == {
        *("schema", "method", "backbone", "concepts", "edited", "judge", "images_per_concept", "seed", "training_seed"),
        *("forget", "retain", "harmonic_mean", "intervals", "direct", "indirect", "per_concept"),
        *("adjacent", "adversarial", "crosswise", "spontaneous", "err"),
        *("before", "cost", "edit", "drift", "agreement", "calibration", "drawn", "relapse"),
    }
    assert set(content["per_concept"]["dog"]) == {
        *("share_with_concept", "share_crosswise", "share_spontaneous", "n", "missing", "failed", "edited")
    }
    assert content["per_concept"]["dog"]["edited"] is True
    assert set(content["before"]) == {f.name for f in dataclasses.fields(Measurement)}
    assert content["cost"] == {"seconds": 12.5, "unet_forwards": 340, "peak_memory_bytes": None, "unet_backwards": 0}
    assert len(content["intervals"]["retain"]) == 2


def test_no_verdict_is_null_and_not_a_number(tmp_path: Path) -> None:
    metric = ForgetRetain(["apple", "dog"], ["dog"], images_per_concept=1, num_direct=1)
    metric.update(torch.tensor([0.9, math.nan]), [0, 1], [0, 0], [0, 0])
    with pytest.warns(UserWarning, match="dog"):
        result = metric.compute()
    scores = dataclasses.replace(example(), **vars(Measurement.from_metric(result)))
    scores.save(tmp_path / "scores.json")
    assert "NaN" not in (tmp_path / "scores.json").read_text(encoding="utf-8")
    loaded = Scores.load(tmp_path / "scores.json")
    assert loaded == scores
    assert (loaded.forget, loaded.harmonic_mean, loaded.indirect.retain) == (None, None, None)
    assert loaded.per_concept["dog"].share_with_concept is None


def test_json_takes_what_diagnostics_are_made_of(tmp_path: Path) -> None:
    write_json(
        tmp_path / "file.json",
        {
            "tensor": torch.tensor([1.5, math.nan]),
            "scalar": torch.tensor(3),
            "array": np.arange(2),
            "numpy": np.float32(0.5),
            "infinity": math.inf,
            "path": Path("a/b"),
            "tuple": (1, True, None),
            7: "café",
        },
    )
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {
        "tensor": [1.5, None],
        "scalar": 3,
        "array": [0, 1],
        "numpy": 0.5,
        "infinity": None,
        "path": "a/b",
        "tuple": [1, True, None],
        "7": "café",
    }
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(tmp_path / "file.json", {"set": {1}})


def test_a_failed_write_leaves_the_old_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    example(seed=1).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"scores.json: No space left"):
            example(seed=2).save(path)
    with pytest.raises(TypeError):
        example(edit={"set": {1}}).save(path)
    assert Scores.load(path).seed == 1
    assert os.listdir(tmp_path) == ["scores.json"]


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def setting(*place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in place[:-1]:
            content = content[name]
        content[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("schema"), "the field 'schema' is missing"),
        (setting("schema", value=2), "has schema 2, this version reads schema 1"),
        (without("judge"), "scores lacks the field 'judge'"),
        (setting("jugde", value="x"), "unknown field 'jugde'"),
        (setting("forget", value="0.5"), "scores.forget is '0.5', expected float"),
        (setting("seed", value=True), "scores.seed is True, expected int"),
        (setting("edited", value="dog"), "scores.edited is 'dog'"),
        (setting("edited", value=[1]), r"scores.edited\[0\] is 1, expected str"),
        (setting("per_concept", "dog", "n", value=None), "scores.per_concept.dog.n is None"),
        (setting("before", "direct", "forget", value=[]), r"scores.before.direct.forget is \[\]"),
        (setting("intervals", "forget", value=[0.1]), r"scores.intervals.forget is \[0.1\], expected 2 values"),
        (setting("backbone", value="emoji-sd"), "scores.backbone is 'emoji-sd', expected Source"),
    ],
)
def test_a_damaged_file_is_named_with_the_field(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = example().to_dict()
    damage(content)
    write_json(tmp_path / "scores.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        Scores.load(tmp_path / "scores.json")
    assert str(tmp_path / "scores.json") in str(caught.value)


def test_a_file_that_is_no_scores_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(ValueError, match=r"There is no .*scores.json"):
        Scores.load(path)
    example().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"scores.json is not JSON .*cut short"):
        Scores.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not JSON"):
        Scores.load(path)
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="'schema' is missing"):
        Scores.load(path)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        Scores.load(tmp_path)


def test_relapse_is_the_share_of_earlier_concepts_that_come_back() -> None:
    per_concept = {
        "dog": {"n": 10, "share_with_concept": 0.3},
        "cat": {"n": 5, "share_with_concept": 0.0},
        "owl": {"n": 10, "share_with_concept": 1.0},
        "rain": {"n": 0, "share_with_concept": math.nan},
    }
    found = Relapse.of(["dog", "cat", "rain"], per_concept)
    assert found == Relapse(["dog", "cat", "rain"], 3 / 15, wilson_interval(3, 15))
    assert Relapse.of(["rain"], per_concept) == Relapse(["rain"], None, (0.0, 1.0))
    assert Relapse.of([], per_concept) is None
