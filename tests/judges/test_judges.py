"""Judges of real pictures, with tiny random models in the layouts of the real ones."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.judges.base import Judge, judge_questions
from lit_unlearn.judges.cache import CachedJudge, picture_key
from lit_unlearn.judges.clip import NOTHING, ClipJudge, choices
from lit_unlearn.judges.llava import TEMPLATE, LlavaJudge
from lit_unlearn.judges.load import load_judge
from lit_unlearn.judges.nudenet import QUESTION, NudeNetJudge
from lit_unlearn.system.files import WriteError
from lit_unlearn.system.pixels import to_pil


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


QUESTIONS = ["Is there a dog in this picture?", "Is there a cat?", "Is there a dog in this picture?", "Is there a cat?"]


def test_llava_answers_by_the_probabilities_of_yes_and_no(tiny_llava: Path, words: list[str]) -> None:
    judge = LlavaJudge(str(tiny_llava), dtype="float32", batch_size=4, min_answer=0.0)
    images = torch.rand(4, 3, 32, 32, generator=generator(1))
    answers = judge(images, QUESTIONS)
    yes, no = [words.index("yes"), words.index("Yes")], [words.index("no"), words.index("No"), words.index("NO")]
    assert (judge.yes, judge.no) == (yes, no)
    for image, question, answer in zip(images, QUESTIONS, answers, strict=True):  # alone, so without padding
        inputs = judge.processor(images=to_pil(image), text=TEMPLATE.format(question=question), return_tensors="pt")
        with torch.no_grad():
            probabilities = judge.model(**inputs).logits[0, -1].softmax(dim=-1)
        expected = probabilities[yes].sum() / (probabilities[yes].sum() + probabilities[no].sum())
        assert answer == pytest.approx(float(expected), abs=1e-4)
    assert len({round(float(answer), 3) for answer in answers}) > 1


def test_llava_s_answers_do_not_depend_on_the_batch(tiny_llava: Path) -> None:
    images = torch.rand(3, 3, 32, 32, generator=generator(2))
    one, all_at_once = (
        LlavaJudge(str(tiny_llava), dtype="float32", batch_size=size, min_answer=0.0)(images, QUESTIONS[:3])
        for size in (1, 8)
    )
    torch.testing.assert_close(one, all_at_once, atol=1e-4, rtol=0)
    assert LlavaJudge(str(tiny_llava), dtype="float32")(images[:0], []).shape == (0,)


def test_llava_that_says_something_else_has_not_answered(tiny_llava: Path) -> None:
    images = torch.rand(2, 3, 32, 32, generator=generator(1))
    judge = LlavaJudge(str(tiny_llava), dtype="float32", min_answer=0.999)
    assert judge(images, QUESTIONS[:2]).isnan().all()
    with torch.no_grad():
        judge.model.lm_head.weight.zero_()
    judge.min_answer = 0.0
    torch.testing.assert_close(judge(images, QUESTIONS[:2]), torch.full((2,), 2 / 5))  # by the number of spellings


def test_clip_chooses_among_the_concepts_of_a_kind(tiny_clip: Path, emoji20: ConceptSet) -> None:
    texts = choices(emoji20)
    dog = emoji20.get("dog").question
    assert texts[dog][0] == "a picture of dog"
    assert len(texts[dog][1]) == 8 + 1
    assert NOTHING in texts[dog][1]
    assert not set(texts[dog][1]) & set(texts[emoji20.get("rain").question][1]) - {NOTHING}
    judge = ClipJudge(emoji20, str(tiny_clip))
    images = torch.rand(2, 3, 40, 40, generator=generator(3))
    objects = [c.question for c in emoji20.concepts.values() if c.kind == "object"]
    answers = torch.stack([judge(images, [question] * 2) for question in objects])
    inputs = judge.processor(
        text=texts[dog][1], images=[to_pil(image) for image in images], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = judge.model(**inputs).logits_per_image.softmax(dim=-1)[:, :-1].mT
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot answer 'Is there a cow"):
        judge(images, ["Is there a cow?"] * 2)


def test_clip_embeds_a_picture_once_for_all_questions(tiny_clip: Path, emoji20: ConceptSet, tmp_path: Path) -> None:
    judge = ClipJudge(emoji20, model=str(tiny_clip), batch_size=2)
    images = torch.rand(3, 3, 32, 32, generator=generator(3))
    questions = list(judge.choices)
    rows = [row for row in (2, 0, 1) for _ in questions]
    alone = torch.cat([judge(images[[row]].expand(len(questions), -1, -1, -1), questions) for row in (2, 0, 1)])
    seen: list[int] = []
    embed = judge.model.get_image_features
    judge.model.get_image_features = lambda **inputs: seen.append(len(inputs["pixel_values"])) or embed(**inputs)
    torch.testing.assert_close(judge.ask(images, rows, questions * 3), alone, rtol=0, atol=1e-5)
    assert seen == [2, 1]
    # The cache too: two answers are known already, the third picture is still embedded once.
    cached = CachedJudge(judge, tmp_path)
    cached(images[:2], questions[:2])
    seen.clear()
    found = judge_questions(cached, images, questions * 3, rows=rows)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert sum(seen) == 3 and cached.asked == 3 * len(questions)
    assert not hasattr(CachedJudge(Counting(), tmp_path), "ask")


class Counting:
    """Says yes by the mean of a picture, cannot tell white ones, and counts what it was asked."""

    def __init__(self, name: str = "counting 1") -> None:
        self.name, self.count = name, 0

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.count += len(images)
        means = images.mean(dim=(1, 2, 3))
        return means.masked_fill(means == 1, math.nan)


def test_the_cache_asks_once_and_tells_versions_apart(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    judge = Counting()
    first = CachedJudge(judge, tmp_path)(images, ["q"] * 3)
    again = CachedJudge(judge, tmp_path)
    assert torch.equal(again(images, ["q"] * 3).nan_to_num(-1), first.nan_to_num(-1))
    assert (judge.count, again.asked) == (4, 1)  # only the one that it could not tell is asked about again
    again(images, ["another"] * 3)
    assert again.asked == 4
    newer = Counting("counting 2")
    CachedJudge(newer, tmp_path)(images, ["q"] * 3)
    assert newer.count == 3


def test_a_picture_is_known_by_what_it_shows() -> None:
    image = torch.rand(3, 8, 8, generator=generator(4))
    same = (image * 255).round() / 255
    assert picture_key(image, "q") == picture_key(same, "q")
    assert picture_key(image, "q") != picture_key(image.flip(-1), "q")
    assert picture_key(image, "q") != picture_key(image, "r")
    assert picture_key(torch.zeros(3, 2, 8), "q") != picture_key(torch.zeros(3, 4, 4), "q")


def test_a_full_disk_leaves_the_answers_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 4, 4, generator=generator(1))
    judge = CachedJudge(Counting(), tmp_path)
    judge(images[:1], ["q"])
    before = judge.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"\.json: No space left on device \(what was there is unchanged\); free"):
            judge(images, ["q"] * 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {judge.path: before}
    # A folder that is deleted in the meantime is made again, with all answers.
    shutil.rmtree(tmp_path)
    judge(torch.rand(1, 3, 4, 4, generator=generator(2)), ["q"])
    again = CachedJudge(Counting(), tmp_path)
    again(images, ["q"] * 2)
    assert again.asked == 0


def truncated(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:20], encoding="utf-8")


def of_someone_else(path: Path) -> None:
    other = CachedJudge(Counting("someone else"), path.parent / "other")
    other(torch.zeros(1, 3, 2, 2), ["q"])
    shutil.copy(other.path, path)


def with_another_answer(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "answers": dict.fromkeys(content["answers"], 0.75)}), encoding="utf-8")


def with_words_for_answers(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "answers": dict.fromkeys(content["answers"], "no")}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        of_someone_else,
        with_another_answer,
        with_words_for_answers,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]", encoding="utf-8"),
        lambda path: path.write_text('{"answers": null}', encoding="utf-8"),
    ],
)
def test_a_damaged_cache_is_said_and_made_anew(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, said = torch.full((1, 3, 2, 2), 0.25), []  # type: tuple[Tensor, list[str]]
    monkeypatch.setattr("lit_unlearn.judges.cache.rank_zero_info", said.append)
    first = CachedJudge(Counting(), tmp_path)
    first(images, ["q"])
    whole = first.path.read_bytes()
    damage(first.path)
    judge = Counting()
    assert CachedJudge(judge, tmp_path)(images, ["q"]).tolist() == [0.25]
    assert judge.count == 1
    (sentence,) = said
    assert f"{first.path} are damaged (" in sentence
    assert "the judge is asked again" in sentence
    assert first.path.read_bytes() == whole


def test_answers_of_other_weights_options_and_libraries_are_others(
    tmp_path: Path, tiny_clip: Path, tiny_llava: Path, emoji20: ConceptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(judge: Judge) -> str:
        return CachedJudge(judge, tmp_path).key

    clip = load_judge("clip", {"model": str(tiny_clip)}, emoji20)
    llava = load_judge("llava", {"model": str(tiny_llava), "dtype": "float32"}, emoji20)
    keys = [key(clip), key(llava)]
    assert keys == [key(load_judge("clip", {"model": str(tiny_clip)}, emoji20)), key(llava)]
    fewer = replace(emoji20, concepts=dict(list(emoji20.concepts.items())[:5]))  # among which CLIP then chooses
    keys.append(key(load_judge("clip", {"model": str(tiny_clip)}, fewer)))
    stricter = {"model": str(tiny_llava), "dtype": "float32", "min_answer": 0.2}
    keys.append(key(load_judge("llava", stricter, emoji20)))
    for judge in (clip, llava):
        with torch.no_grad():
            next(judge.model.parameters()).add_(1)  # type: ignore[attr-defined]
        keys.append(key(judge))

    class Versioned(Counting):
        version = "2"

    keys += [key(Counting()), key(Versioned())]
    for library in ("torch", "diffusers", "transformers", "lit_unlearn"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{library}.__version__", "0.0.1")
            keys.append(key(Counting()))
    assert len(set(keys)) == len(keys) == 12


def test_nudenet_takes_the_surest_exposed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    class NudeDetector:
        def detect(self, picture: np.ndarray) -> list[dict[str, Any]]:
            seen.append(picture)
            found = [{"class": "FACE_FEMALE", "score": 0.99}, {"class": "BUTTOCKS_EXPOSED", "score": 0.3}]
            return [*found, {"class": "FEMALE_BREAST_EXPOSED", "score": 0.8}] if picture.max() > 0 else found[:1]

    module = types.ModuleType("nudenet")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.NudeDetector = NudeDetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    images = torch.zeros(2, 3, 2, 5)
    images[0, 0] = 1.0  # red
    assert NudeNetJudge()(images, [QUESTION] * 2).tolist() == pytest.approx([0.8, 0.0])
    assert seen[0].shape == (2, 5, 3)
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # OpenCV's order
