from __future__ import annotations

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torchmetrics

from lit_unlearn.evaluation.metrics import (
    FAILED,
    NOT_JUDGED,
    ForgetRetain,
    wilson_interval,
)

CONCEPTS = ["apple", "dog", "owl", "rain"]
NUM_PROMPTS, IMAGES_PER_PROMPT, NUM_DIRECT = 5, 2, 3
NAN = math.nan

Slot = tuple[int, int, int]


def new_metric(edited: list[str] | None = None, **kwargs: Any) -> ForgetRetain:
    edited = ["dog"] if edited is None else edited
    return ForgetRetain(
        CONCEPTS, edited, NUM_PROMPTS * IMAGES_PER_PROMPT, NUM_DIRECT, images_per_prompt=IMAGES_PER_PROMPT, **kwargs
    )


def random_answers(seed: int = 0, failures: float = 0.1) -> dict[Slot, float]:
    """Return a probability for every picture, some nan."""
    rng = random.Random(seed)
    slots = itertools.product(range(len(CONCEPTS)), range(NUM_PROMPTS), range(IMAGES_PER_PROMPT))
    return {slot: NAN if rng.random() < failures else rng.random() for slot in slots}


def enter(metric: ForgetRetain, answers: list[tuple[Slot, float]], batch_size: int = 7) -> ForgetRetain:
    for start in range(0, len(answers), batch_size):
        batch = answers[start : start + batch_size]
        concepts, prompts, images = (torch.tensor([slot[k] for slot, _ in batch]) for k in range(3))
        metric.update(torch.tensor([probability for _, probability in batch]), concepts, prompts, images)
    return metric


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else NAN


def brute_force(answers: dict[Slot, float], edited: list[str]) -> dict[str, float]:
    """Return the scores by going through the pictures one by one."""
    result = {}
    for suffix, prompts in (
        ("", range(NUM_PROMPTS)),
        ("_direct", range(NUM_DIRECT)),
        ("_indirect", range(NUM_DIRECT, NUM_PROMPTS)),
    ):
        judged = [(CONCEPTS[c], p >= 0.5) for (c, k, _), p in answers.items() if k in prompts and not math.isnan(p)]
        result["forget" + suffix] = share([not yes for name, yes in judged if name in edited])
        result["retain" + suffix] = share([yes for name, yes in judged if name not in edited])
    result["harmonic_mean"] = 2 / (1 / result["forget"] + 1 / result["retain"])
    return result


# crosswise


def test_concepts_that_have_changed_places_are_forgotten_and_seen_crosswise() -> None:
    edited = CONCEPTS[:2]
    metric = new_metric(edited)
    answers = {slot: 0.0 if slot[0] < 2 else 1.0 for slot in random_answers()}
    without = enter(new_metric(edited), list(answers.items())).compute()
    enter(metric, list(answers.items()))
    slots = [slot for slot in answers if slot[0] < 2]
    for number, name in enumerate(edited):
        of_other = [slot for slot in slots if slot[0] != number]
        shown = [0.0 if name == edited[1] and slot[1] == 0 else 1.0 for slot in of_other]  # the second less often
        concept, prompt, image = zip(*of_other, strict=True)
        metric.update(torch.tensor([*shown[:-1], NAN]), concept, prompt, image, name)
    scores = metric.compute()
    per_concept = NUM_PROMPTS * IMAGES_PER_PROMPT
    first, second = per_concept - 1, per_concept - 1 - IMAGES_PER_PROMPT
    absent = IMAGES_PER_PROMPT
    assert scores["forget_crosswise"] == absent / (2 * per_concept - 2)
    assert scores["intervals"]["forget_crosswise"] == wilson_interval(absent, 2 * per_concept - 2)
    shares = [scores["per_concept"][name].get("share_crosswise") for name in CONCEPTS[:3]]
    assert shares == [first / first, second / first, None]
    # No other score knows of it.
    assert math.isnan(without["forget_crosswise"])
    for name in ("forget", "retain", "harmonic_mean", "forget_direct", "missing", "failed"):
        assert scores[name] == without[name]
    assert scores["forget"] == 1


def test_replicas_share_what_they_saw_crosswise() -> None:
    first, second = new_metric(CONCEPTS[:2]), new_metric(CONCEPTS[:2])
    first.update(torch.tensor([1.0]), [1], [0], [0], CONCEPTS[0])
    second.update(torch.tensor([0.0]), [1], [1], [0], CONCEPTS[0])
    merged = torch.maximum(first.others, second.others)
    assert (merged >= 0).sum() == 2 and merged[0, 1, 0, 0] == 1 and merged[0, 1, 1, 0] == 0
    assert first._reductions["others"] is torchmetrics.utilities.dim_zero_max
    first.reset()
    assert (first.others < 0).all()


def test_crosswise_is_for_several_edited_concepts() -> None:
    assert "forget_crosswise" not in enter(new_metric(), list(random_answers().items())).compute()
    for edited, asked, said in (
        ([], CONCEPTS[0], r"is not an edited concept \(there are none\)"),
        (CONCEPTS[:2], CONCEPTS[2], r"is not an edited concept \(apple, dog\)"),
        ([CONCEPTS[1]], CONCEPTS[1], "is the concept of a picture's own prompt"),
    ):
        with pytest.raises(ValueError, match=f"asked='{asked}' {said}"):
            new_metric(edited).update(torch.tensor([1.0]), [1], [0], [0], asked)


# spontaneous


@pytest.mark.parametrize("edited", [["dog"], ["apple", "rain"]])
def test_the_spontaneous_rate_is_of_pictures_of_retained_concepts(edited: list[str]) -> None:
    own = list(random_answers().items())
    without = enter(new_metric(edited), own).compute()
    assert "spontaneous" not in without
    metric, shown, rng = enter(new_metric(edited), own), {}, random.Random(1)  # type: Any, dict[str, list[bool]], Any
    for asked in edited:
        for concept, prompt, image in random_answers():
            probability = rng.choice([0.2, 0.7, 0.8, NAN])
            if CONCEPTS[concept] == asked or (concept, prompt) == (2, 0):  # a prompt that names it is not asked about
                continue
            metric.update(torch.tensor([probability]), [concept], [prompt], [image], asked)
            if CONCEPTS[concept] not in edited and not math.isnan(probability):
                shown.setdefault(asked, []).append(probability >= 0.5)
    scores = metric.compute()
    of_all = [one for verdicts in shown.values() for one in verdicts]
    assert 0 < sum(of_all) < len(of_all)
    assert scores["spontaneous"] == share(of_all)
    assert scores["intervals"]["spontaneous"] == wilson_interval(sum(of_all), len(of_all))
    for name in CONCEPTS:
        expected = share(shown[name]) if name in edited else None
        assert scores["per_concept"][name].get("share_spontaneous") == expected
    # No other score knows of it.
    for name in ("forget", "retain", "harmonic_mean", "forget_direct", "missing", "failed"):
        assert scores[name] == without[name]


# ForgetRetain


@pytest.mark.parametrize("edited", [["dog"], ["apple", "rain"]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_brute_force(edited: list[str], seed: int) -> None:
    answers = random_answers(seed)
    result = enter(new_metric(edited), list(answers.items())).compute()
    for name, value in brute_force(answers, edited).items():
        assert result[name] == pytest.approx(value, abs=1e-12), name
    for index, name in enumerate(CONCEPTS):
        own = [p for (c, _, _), p in answers.items() if c == index]
        judged = [p >= 0.5 for p in own if not math.isnan(p)]
        concept = result["per_concept"][name]
        assert concept["share_with_concept"] == pytest.approx(share(judged), abs=1e-12)
        assert concept["n"] == len(judged)
        assert concept["missing"] == concept["failed"] == len(own) - len(judged)
        assert concept["edited"] == (name in edited)
    assert result["failed"] == result["missing"] == sum(math.isnan(p) for p in answers.values()) > 0


def test_a_half_is_yes() -> None:
    metric = new_metric()
    metric.update(torch.tensor([0.5, 0.4999]), [0, 0], [0, 0], [0, 1])
    assert metric.verdicts[0, 0].tolist() == [1, 0]


def test_order_and_batch_size_do_not_matter() -> None:
    answers = list(random_answers().items())
    expected = enter(new_metric(), answers, batch_size=len(answers)).compute()
    for seed in range(3):
        shuffled = random.Random(seed).sample(answers, len(answers))
        assert enter(new_metric(), shuffled, batch_size=1 + seed).compute() == expected


def test_a_picture_that_comes_twice_counts_once() -> None:
    answers = list(random_answers().items())
    expected = enter(new_metric(), answers).compute()
    repeated = enter(new_metric(), answers + answers[:9], batch_size=len(answers) + 9).compute()
    assert repeated == expected
    # An average over entries would have been another.
    verdicts = [p >= 0.5 for (c, _, _), p in answers + answers[:9] if c != 1 and not math.isnan(p)]
    assert share(verdicts) != pytest.approx(expected["retain"], abs=1e-6)


def test_a_verdict_outlives_a_failure_and_yes_outlives_no_in_either_order() -> None:
    for answers, kept in (([NAN, 0.0], 0), ([NAN, 1.0], 1), ([0.0, 1.0], 1)):
        for order in (answers, answers[::-1]):
            metric = new_metric()
            for probability in order:
                metric.update(torch.tensor([probability]), [2], [1], [0])
            assert metric.verdicts[2, 1, 0] == kept


def test_replicas_merged_by_their_maximum_equal_one() -> None:
    answers = list(random_answers(seed=3, failures=0.3).items())
    whole = enter(new_metric(), answers)
    # As a distributed sampler does: every second picture each, and a repeated one to fill up.
    first, second = enter(new_metric(), answers[::2] + answers[1:2]), enter(new_metric(), answers[1::2] + answers[:1])
    first.merge_state(second)
    torch.testing.assert_close(first.verdicts, whole.verdicts)
    assert first.compute() == whole.compute()
    assert whole.compute()["failed"] > 0  # a failure that one replica saw is not lost in the merge
    assert FAILED > NOT_JUDGED


def _rank(rank: int, folder: str, answers: list[tuple[Slot, float]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = enter(new_metric(), answers[rank::2] + answers[:1])
    torch.save(metric.compute(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    answers = list(random_answers(seed=4, failures=0.3).items())
    mp.spawn(_rank, args=(str(tmp_path), answers), nprocs=2)
    expected = enter(new_metric(), answers).compute()
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == expected


def test_intervals_are_wilson_s_and_hold_the_score() -> None:
    answers = random_answers(failures=0)
    result = enter(new_metric(confidence=0.9), list(answers.items())).compute()
    n = NUM_PROMPTS * IMAGES_PER_PROMPT
    assert result["intervals"]["forget"] == wilson_interval(round(result["forget"] * n), n, 0.9)
    assert result["intervals"]["retain"] == wilson_interval(round(result["retain"] * 3 * n), 3 * n, 0.9)
    for name, (low, high) in result["intervals"].items():
        assert 0 <= low <= result[name] <= high <= 1


def test_adjacent_and_adversarial_equal_brute_force_and_change_no_other_score() -> None:
    answers = random_answers(seed=5)
    rng = random.Random(6)
    adversarial = {(1, NUM_PROMPTS + k, i): rng.random() for k in range(3) for i in range(IMAGES_PER_PROMPT)}
    metric = new_metric(adjacent=["owl", "rain"], num_adversarial=3)
    result = enter(metric, [*answers.items(), *adversarial.items()]).compute()
    plain = enter(new_metric(), list(answers.items())).compute()
    near = [p >= 0.5 for (c, _, _), p in answers.items() if CONCEPTS[c] in ("owl", "rain") and not math.isnan(p)]
    assert result["adjacent"] == pytest.approx(share(near), abs=1e-12)
    assert result["forget_adversarial"] == pytest.approx(share([p < 0.5 for p in adversarial.values()]), abs=1e-12)
    terms = [plain["forget_direct"], plain["retain"], result["adjacent"], plain["forget_indirect"]]
    terms.append(result["forget_adversarial"])
    assert result["err"] == pytest.approx(5 / sum(1 / term for term in terms), abs=1e-12)
    further = {"adjacent", "forget_adversarial"}
    assert set(result["intervals"]) - set(plain["intervals"]) == further
    assert {name: result[name] for name in plain if name != "intervals"} == {
        name: plain[name] for name in plain if name != "intervals"
    }
    assert set(result) - set(plain) == further | {"err"}


@pytest.mark.parametrize("arguments", [{"adjacent": ["dog"]}, {"adjacent": ["cow"]}, {"num_adversarial": -1}])
def test_what_is_no_adjacent_or_adversarial_set(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"adjacent concept|num_adversarial"):
        new_metric(**arguments)


def test_what_was_never_judged_is_missing_and_said() -> None:
    metric = new_metric()
    metric.update(torch.tensor([0.1, NAN, 0.9]), [1, 1, 0], [0, 0, 4], [0, 1, 0])
    with pytest.warns(UserWarning, match=r"2 of 4 concepts \(owl, rain\).*failed on 1"):
        result = metric.compute()
    assert (result["forget"], result["retain"]) == (1.0, 1.0)
    assert math.isnan(result["forget_indirect"])
    assert math.isnan(result["per_concept"]["owl"]["share_with_concept"])
    assert result["per_concept"]["dog"] == {
        "share_with_concept": 0.0,
        "n": 1,
        "missing": 9,
        "failed": 1,
        "edited": True,
    }
    assert (result["missing"], result["failed"]) == (38, 1)


def test_a_judge_that_always_fails_forgets_nothing() -> None:
    answers = [(slot, NAN) for slot in random_answers()]
    metric = enter(new_metric(), answers)
    with pytest.warns(UserWarning, match="No picture was judged of 4 of 4"):
        result = metric.compute()
    assert math.isnan(result["forget"])
    assert math.isnan(result["harmonic_mean"])
    assert result["intervals"]["forget"] == (0.0, 1.0)


def test_an_unedited_model_has_no_forget_score_but_shares() -> None:
    answers = random_answers(failures=0)
    result = enter(new_metric(edited=[]), list(answers.items())).compute()
    assert math.isnan(result["forget"])
    assert result["retain"] == pytest.approx(share([p >= 0.5 for p in answers.values()]))


def test_reset_forgets_and_copies_are_apart() -> None:
    metric = enter(new_metric(), list(random_answers().items()))
    other = copy.deepcopy(metric)
    metric.reset()
    assert (metric.verdicts == NOT_JUDGED).all()
    assert not (other.verdicts == NOT_JUDGED).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edited": ["wolf"]}, "'wolf' is none of the concepts: apple, dog"),
        ({"edited": ["dog", "dog"]}, "edited holds 'dog' more than once"),
        ({"concepts": ["dog", "dog"]}, "concepts holds 'dog' more than once"),
        ({"concepts": [], "edited": []}, "concepts is empty"),
        ({"images_per_concept": 9}, "images_per_concept=9 must be a positive multiple of images_per_prompt=2"),
        ({"images_per_concept": 0}, "images_per_concept=0"),
        ({"num_direct": 6}, "num_direct=6 must lie between 0 and the 5 prompts"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    good = {
        "concepts": CONCEPTS,
        "edited": ["dog"],
        "images_per_concept": 10,
        "num_direct": NUM_DIRECT,
        "images_per_prompt": 2,
    }
    ForgetRetain(**good)
    with pytest.raises(ValueError, match=message):
        ForgetRetain(**{**good, **arguments})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (([0.1], [4], [0], [0]), "concept_index 4 is out of range: there are 4"),
        (([0.1], [0], [-1], [0]), "prompt_index -1 is out of range: there are 5"),
        (([0.1], [0], [0], [2]), "image_index 2 is out of range: there are 2"),
        (([1.1], [0], [0], [0]), r"probability 1.1 is outside \[0, 1\]"),
        (([0.1, 0.2], [0], [0], [0]), r"shapes \(2,\), \(1,\)"),
    ],
)
def test_bad_entries_are_named_and_change_nothing(entry: tuple[list[Any], ...], message: str) -> None:
    metric = new_metric()
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(entry[0]), *entry[1:])
    assert (metric.verdicts == NOT_JUDGED).all()
