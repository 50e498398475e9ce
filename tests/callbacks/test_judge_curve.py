"""What the judge is asked about the unedited model's pictures, and where its answers end up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.functional.classification import binary_average_precision

from helpers import Reddish, moved, score
from lit_unlearn.callbacks.evaluation import EvaluationReport
from lit_unlearn.callbacks.judge_curve import JudgeCurve, known_answers
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import Pictures
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.methods.value_refinement import ValueRefinement


def test_a_prompt_says_yes_of_its_concept_and_no_of_others_of_its_kind() -> None:
    concepts = load_concept_set("emoji20")
    items = Pictures(concepts, 2, 0, adversarial=["glossy"]).items
    names, kinds = list(concepts.concepts), [c.kind for c in concepts.concepts.values()]
    known = dict(known_answers(concepts.get("glossy"), concepts, items, None))
    for place, item in enumerate(items):
        name, kind = names[item.concept_index], kinds[item.concept_index]
        adversarial = item.prompt_index >= 10
        if name == "glossy":
            assert known.get(place) is (None if adversarial else True)
        else:  # a prompt of a dog leaves its style open, or names it
            assert known.get(place) is (False if kind == "style" else None)
    assert sum(known.values()) == 20
    assert len(known) == 80


def test_prompts_that_name_the_concept_are_no_negatives() -> None:
    concepts = load_concept_set("emoji20")
    dog, owl = concepts.get("dog"), list(concepts.concepts).index("owl")
    items = [item for item in Pictures(concepts, 1, 0).items if item.concept_index == owl]
    assert len(known_answers(dog, concepts, items, None)) == 10
    named = [item._replace(prompt="an owl and a dog") for item in items]
    assert known_answers(dog, concepts, named, None) == []


@pytest.mark.parametrize(("negatives", "expected"), [(None, 140), (1, 7), (3, 21), (0, 0)])
def test_negatives_of_each_other_concept(negatives: int | None, expected: int) -> None:
    concepts = load_concept_set("emoji20")
    known = known_answers(concepts.get("dog"), concepts, Pictures(concepts, 2, 0).items, negatives)
    assert sum(label for _, label in known) == 20
    assert sum(not label for _, label in known) == expected


def test_a_slow_judge_is_asked_only_if_wanted(pets: str) -> None:
    concepts = load_concept_set(pets)
    items, pictures = Pictures(concepts, 1, 0).items, torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for negatives, questions in ((None, 0), (0, 0), (1, 3), (2, 4)):
        judge = Reddish()
        curve = JudgeCurve(judge, concepts, [concepts.get("dog")], 1, negatives)
        curve.update(pictures, items)
        assert judge.questions == ["Is there a dog in this picture?"] * questions
        assert (curve.compute() == {}) == (questions == 0)
    fast = ClassifierJudge.__new__(ClassifierJudge)
    assert JudgeCurve(fast, concepts, [concepts.get("dog")], 1).is_asked


@pytest.fixture
def edited(refinement: Callable[..., ValueRefinement]) -> ValueRefinement:
    """A module whose edited weights have moved, and whose judge is ``Reddish``."""
    return moved(refinement(), Reddish)


def test_curves_of_the_unedited_model_in_scores_and_tensorboard(edited: ValueRefinement, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    score(edited, tmp_path, EvaluationReport(judge_negatives=6), logger=logger, images_per_prompt=3)
    logger.experiment.flush()
    items, names = Pictures(edited.concepts, 3, 0).items, list(edited.concepts.concepts)
    answers = {}
    for state in ("before", "after"):
        with edited.pretrained.restored() if state == "before" else torch.no_grad():
            pictures = edited.generate([i.prompt for i in items], [i.seed for i in items])
        answers[state] = (pictures.float() / 255)[:, 0].mean(dim=(1, 2))
    labels = torch.tensor([names[item.concept_index] == "dog" for item in items])
    assert not torch.equal(answers["before"], answers["after"])
    expected = float(binary_average_precision(answers["before"], labels.int()))
    calibration = Scores.load(Path(logger.log_dir) / "scores.json").calibration
    assert calibration is not None
    assert list(calibration) == ["dog"]
    assert calibration["dog"]["average_precision"] == pytest.approx(expected)
    assert (calibration["dog"]["positives"], calibration["dog"]["negatives"]) == (6, 6)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.summary_metadata["judge/dog"].plugin_data.plugin_name == "pr_curves"
    (curve,) = (torch.tensor(t.tensor_proto.float_val) for t in events.Tensors("judge/dog")[:1])
    rows = curve.reshape(6, -1)  # counts of true and false positives, true and false negatives, precision, recall
    assert (rows[0][0], rows[1][0]) == (6, 6)  # at threshold 0 all pictures are yes
    assert rows[4][0] == pytest.approx(0.5)


def test_without_the_curve_there_is_no_calibration(edited: ValueRefinement, tmp_path: Path) -> None:
    score(edited, tmp_path, EvaluationReport())  # the judge is no classifier
    assert Scores.load(tmp_path / "scores.json").calibration is None
    with pytest.raises(ValueError, match="judge_negatives=-1 must be at least 0"):
        EvaluationReport(judge_negatives=-1)
    with pytest.raises(ValueError, match="features='vgg' is unknown"):
        EvaluationReport(features="vgg")
