"""A checkpoint of other concepts is refused in one sentence that says what to do, whether it edits any or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import MAX_PAIRS, Pictures, warn_of_edited_targets
from lit_unlearn.evaluation.scores import Measurement
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.rename_tokens import RenameTokens
from lit_unlearn.methods.robust_erasure import RobustErasure
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.stack import check_concepts
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.unet_value_refinement import UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement


@pytest.mark.parametrize(
    ("found", "wanted", "end"),
    [
        ([], ["dog"], "edits no concept (ESD), but concept is dog: give the recipe of its own fit."),
        (["dog"], [], "edits dog, but the recipe edits no concept: give the recipe of its own fit."),
        (["dog", "cat"], ["dog"], 'edits dog, cat, but concept is dog: pass --concept \'["dog", "cat"]\'.'),
        (["soccer ball"], ["dog"], "edits soccer ball, but concept is dog: pass --concept 'soccer ball'."),
    ],
)
def test_what_to_pass_for_a_checkpoint_of_other_concepts(found: list[str], wanted: list[str], end: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_concepts("a.ckpt", "ESD", found, wanted)
    assert str(caught.value) == f"a.ckpt {end}"


def test_the_same_concepts_are_taken() -> None:
    check_concepts("a.ckpt", "ESD", ["dog", "cat"], ["dog", "cat"])
    check_concepts("a.ckpt", "SISS", [], [])


@pytest.mark.parametrize("kind", [ValueRefinement, UCE, SPEED, RobustErasure])
def test_prompts_of_earlier_edits_are_retained_on_top_of_them_and_edited_again_without(
    kind: type[ConceptEditor],
) -> None:
    arguments: dict[str, Any] = {"concept": ["dog", "owl"], "earlier": ["dog"], "model": "emoji-sd"}
    if kind in (UCE, SPEED):
        arguments["prompts"] = "edit_prompts"
    if kind is UCE:
        arguments["preserve"] = "others"
    on_top, again = kind(**arguments, retain_earlier=True), kind(**arguments)
    prompts = [p for p in load_concept_set("emoji20").get("dog").edit_prompts if "owl" not in p]
    kept = [set(next(getattr(m, n) for n in KEPT if hasattr(m, n))) for m in (on_top, again)]
    assert kept[0] >= set(prompts) and not kept[1] & set(prompts)
    assert (on_top.own_labels, on_top.edited_labels) == (["owl"], ["dog", "owl"])
    assert (again.own_labels, again.edited_labels) == (["dog", "owl"], ["dog", "owl"])
    assert [c.name for c, _ in on_top.targets_of_edited] == ["owl"]


KEPT = ("retain_prompts", "preserved", "retained_texts", "preserved_prompts")
"""Where methods have the texts that they retain."""


def test_what_an_earlier_edit_made_into_a_new_concept_is_edited_again(caplog: pytest.LogCaptureFixture) -> None:
    emoji = load_concept_set("emoji20")
    assert [emoji.get(name).target for name in ("dog", "cat", "owl")] == ["cat", "dog", "parrot"]
    arguments: dict[str, Any] = {"concept": ["dog", "owl", "cat"], "earlier": ["dog", "owl"], "retain_earlier": True}
    module = ValueRefinement(**arguments, model="emoji-sd")
    assert (module.new_labels, module.own_labels) == (["cat"], ["dog", "cat"])  # the dog became a cat
    assert not any("dog" in prompt or "cat" in prompt for prompt in module.retain_prompts)
    targets = dict(zip(module.edit_prompts, module.target_prompts, strict=True))
    assert len(targets) > 20 and not any(
        emoji.get(name).find_name(into) for into in targets.values() for name in ("dog", "cat", "owl")
    )
    module.setup("fit")
    assert "Edited again, since an earlier edit may have made it what goes now (cat): dog." in caplog.text


def test_earlier_edits_alone_leave_nothing_to_edit() -> None:
    with pytest.raises(ValueError, match="concept=dog has nothing new to edit: name another concept"):
        UCE(concept="dog", earlier=["dog"], retain_earlier=True)


EMOJI: dict[str, Any] = {"concept": ["dog", "cat"], "model": "emoji-sd", "concept_set": "emoji20"}
MUTUAL = "Targets name concepts that are edited themselves: dog \u2192 cat"


@pytest.mark.parametrize(
    "kind", [ValueRefinement, UNetValueRefinement, MEMIT, UCE, SPEED, ConceptAblation, RobustErasure]
)
def test_every_method_gets_the_repaired_pairs(
    kind: type[ConceptEditor], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    arguments = {"prompts": "edit_prompts"} if kind in (UCE, SPEED) else {}
    places = {"edited_parameters": "xattn-kv"} if kind is UNetValueRefinement else {}
    module = kind(**{**EMOJI, "concept": ["surfing", "walking", "rain"]}, **arguments, **places)
    texts = {text: into for _, pairs in module.targets_of_edited for text, into in pairs}
    assert texts["this is the man on a board in the sea"] == "this is the man standing"
    assert not [text for text in texts if "surfing" in text and "rain" in text]
    assert len(texts) == sum(len(concept.edit_prompts) for concept in module.repaired) < 45
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert "surfing \u2192 standing (not walking)" in caplog.text
    assert not [found for found in recwarn.list if found.category is UserWarning]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ValueRefinement, {}),
        (ValueRefinement, {"pairs": "names"}),
        (MEMIT, {}),
        (UNetValueRefinement, {"edited_parameters": "xattn-kv"}),
        (UCE, {}),
        (UCE, {"prompts": "edit_prompts"}),
        (UCE, {"towards": "prompt", "guide": ["a Cat", "a bird"]}),
        (SPEED, {}),
        (SPEED, {"prompts": "edit_prompts"}),
        (ConceptAblation, {"reference": "frozen"}),
        (RenameTokens, {}),
        (ESD, {"erase_from": "a cat", "eta_form": "code"}),
    ],
)
def test_targets_that_are_edited_are_said_before_anything_is_loaded(
    kind: type[ConceptEditor], arguments: dict[str, Any]
) -> None:
    module = kind(**EMOJI, **arguments, repair_pairs=False)
    with pytest.warns(UserWarning, match=MUTUAL) as said:
        module.setup("fit")
    assert len(said) == 1 and not hasattr(module, "pipeline")
    message = str(said[0].message)
    assert ("cat \u2192 dog" in message) == (arguments.get("towards") != "prompt" and kind is not ESD)
    module.setup("test")  # warnings are errors


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (UCE, {"towards": "empty"}),
        (SPEED, {"towards": "empty"}),
        (ESD, {}),
        (UCE, {"concept": ["dog", "owl"]}),
        (ValueRefinement, {"concept": "dog"}),
    ],
)
def test_targets_that_stay_are_not_spoken_of(
    kind: type[ConceptEditor], arguments: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    kind(**{**EMOJI, **arguments}).setup("fit")
    assert not [found for found in recwarn.list if found.category is UserWarning]


def test_chains_and_target_prompts_are_named_and_many_pairs_are_counted(
    recwarn: pytest.WarningsRecorder,
) -> None:
    UCE(**{**EMOJI, "concept": ["surfing", "walking"]}, repair_pairs=False).setup("fit")
    assert "surfing \u2192 walking" in str(recwarn.pop(UserWarning).message)
    dog, cat = (replace(load_concept_set("emoji20").get(name), target="nothing") for name in ("dog", "cat"))
    both = ("a dog beside a cat", "a parrot beside a cat")  # the cat is where the dog stands, not what it becomes
    warn_of_edited_targets([(dog, [both]), (cat, [("a cat", "cats, dogs")])])
    assert not [found for found in recwarn.list if found.category is UserWarning]
    warn_of_edited_targets([(dog, [both, ("one", "cats in a basket"), ("a dog", "a cat in the rain")]), (cat, [])])
    assert "themselves: dog \u2192 cat ('a cat in the rain'); such" in str(recwarn.pop(UserWarning).message)
    everything = list(load_concept_set("emoji20").concepts.values())
    warn_of_edited_targets(
        [(concept, [("", " and ".join(other.name for other in everything))]) for concept in everything]
    )
    assert f" and {20 * 19 - MAX_PAIRS} more; such" in str(recwarn.pop(UserWarning).message)


class RednessJudge:
    """Sees in a picture what it sees, whatever it is asked; remembers what it was asked."""

    name = "redness"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.asked += questions
        return (images[:, 0].mean(dim=(1, 2)) >= 0.5).float()


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_edited_concepts_are_judged_on_the_pictures_of_each_other(batch_size: int) -> None:
    edited = ["dog", "cat", "rain"]
    module = UCE(**{**EMOJI, "concept": edited})
    judge = module.judge = RednessJudge()  # type: ignore[assignment]
    items = Pictures(module.concepts, 1, 0, adversarial=edited).items
    pictures = torch.randint(256, (len(items), 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    metric = module.metric(1)
    for start in range(0, len(items), batch_size):
        module.score(metric, pictures[start : start + batch_size], items[start : start + batch_size])
    scores = metric.compute()
    # Each edited concept once more for the direct and indirect prompts of the two others: no picture is new.
    assert len(judge.asked) == len(items) + 3 * 2 * 10
    own = {name: scores["per_concept"][name]["share_with_concept"] for name in edited}
    assert len(set(own.values())) > 1
    for name in edited:
        others = [own[other] for other in edited if other != name]
        assert scores["per_concept"][name]["share_crosswise"] == pytest.approx(sum(others) / 2)
    assert scores["forget_crosswise"] == pytest.approx(1 - sum(own.values()) / 3)
    assert Measurement.from_metric(scores).crosswise == scores["forget_crosswise"]
    assert "share_crosswise" not in scores["per_concept"]["owl"]


def test_one_edited_concept_is_asked_about_once() -> None:
    module = UCE(**{**EMOJI, "concept": "dog"})
    judge = module.judge = RednessJudge()  # type: ignore[assignment]
    items, metric = Pictures(module.concepts, 1, 0).items, module.metric(1)
    module.score(metric, torch.zeros(len(items), 3, 2, 2, dtype=torch.uint8), items)
    assert judge.asked == [item.question for item in items]
    scores = Measurement.from_metric(metric.compute())
    assert scores.crosswise is None and scores.per_concept["dog"].share_crosswise is None


def test_edited_concepts_are_asked_about_on_retained_pictures_that_do_not_name_them() -> None:
    module = UCE(**{**EMOJI, "concept": ["glossy", "dog"]}, spontaneous=True)
    judge = module.judge = RednessJudge()  # type: ignore[assignment]
    module.asks_spontaneous = True
    items = Pictures(module.concepts, 1, 0, adversarial=["glossy", "dog"]).items
    pictures = torch.randint(256, (len(items), 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    metric = module.metric(1)
    for start in range(0, len(items), 7):
        module.score(metric, pictures[start : start + 7], items[start : start + 7])
    scores, names = Measurement.from_metric(metric.compute()), list(module.concepts.concepts)
    red = (pictures[:, 0].float().mean(dim=(1, 2)) / 255 >= 0.5).tolist()
    asked, shown = 0, 0
    for concept in module.edited:
        own = [
            one
            for one, item in zip(red, items, strict=True)
            if names[item.concept_index] not in ("glossy", "dog") and not concept.find_name(item.prompt)
        ]
        assert len(own) < 180 if concept.name == "glossy" else len(own) <= 180  # some other prompts name the style
        assert scores.per_concept[concept.name].share_spontaneous == pytest.approx(sum(own) / len(own))
        asked, shown = asked + len(own), shown + sum(own)
    assert scores.spontaneous == pytest.approx(shown / asked)
    assert scores.per_concept["owl"].share_spontaneous is None
    # One question for each picture, twenty crosswise, and no more than these.
    assert len(judge.asked) == len(items) + 2 * 10 + asked


class QuickJudge(RednessJudge):
    quick = True


@pytest.mark.parametrize(
    ("judge", "spontaneous", "asks"),
    [
        (RednessJudge, None, False),
        (RednessJudge, True, True),
        (RednessJudge, False, False),
        (QuickJudge, None, True),
        (QuickJudge, False, False),
    ],
)
def test_a_slow_judge_is_asked_only_if_told_so_and_says_it(
    judge: type[RednessJudge], spontaneous: bool | None, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_unlearn.methods.shared.concept_editor.rank_zero_info", said.append)
    module = UCE(**{**EMOJI, "concept": "dog"}, spontaneous=spontaneous)
    module.load_judge = judge  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(images_per_prompt=1))  # type: ignore[assignment]
    module.on_test_start()
    assert module.asks_spontaneous is asks
    assert len(said) == (judge is RednessJudge and spontaneous is None)
    assert all("spontaneous rate is not measured, since the judge 'redness' is slow" in line for line in said)
    module.on_validation_start()
    assert not module.asks_spontaneous  # a look between epochs needs no rate
