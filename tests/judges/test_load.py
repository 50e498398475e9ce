"""From what a recipe calls a judge to the judge, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.judges.base import JudgeError, NamedJudge, judge_questions
from lit_unlearn.judges.cache import CachedJudge
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.judges.emoji import EmojiJudge
from lit_unlearn.judges.load import (
    cache_version,
    check_judge_name,
    check_stored,
    find_judge,
    load_cached_judge,
    load_judge,
    shipped_judges,
)

MINE = """
import math
from typing import Literal

import torch

from lit_unlearn.judges.base import NamedJudge, UnknownQuestionError


class Plain:
    '''Has a name and a call, and no more.'''

    def __init__(self, threshold: float, mode: Literal["mean", "amax"] = "mean"):
        self.name, self.threshold, self.mode = f"plain {threshold}", threshold, mode

    def __call__(self, images, questions):
        return (getattr(images.flatten(1), self.mode)(1) > self.threshold).float()


class OnlyDogs(NamedJudge):
    name = "only dogs"

    def __init__(self, concepts):
        self.concepts = concepts

    @classmethod
    def check(cls, options, questions):
        known = ["Is there a dog in this picture?"]
        if unknown := [question for question in questions if question not in known]:
            raise UnknownQuestionError("only dogs", unknown, known)

    def __call__(self, images, questions):
        return torch.ones(len(images))


class Nameless(Plain):
    def __init__(self):
        pass


class Lists(Plain):
    def __init__(self):
        super().__init__(0.5)

    def __call__(self, images, questions):
        return [0.5] * len(images)


class NeedsMore(Plain):
    def __init__(self):
        import a_package_that_nobody_has


class Picky(Plain):
    def __init__(self, threshold: float = 0.5):
        raise ValueError(f"threshold={threshold} is too high: take less.")


class Empty:
    pass


def function(images, questions):
    return images


function.Inner = Plain
"""


@pytest.fixture(scope="session")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


@pytest.fixture(scope="session")
def paper20() -> ConceptSet:
    return load_concept_set("paper20")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``my_judges`` of somebody else's."""
    (tmp_path / "my_judges.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "broken_judges.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "leaving_judges.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_judges", "broken_judges", "leaving_judges"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "my_judges.py"


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the extras is there."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


# --- names


def test_our_judges_declare_their_names() -> None:
    shipped = shipped_judges()
    assert sorted(shipped) == ["clip", "emoji", "emoji_second", "llava", "nudenet"]
    assert all(issubclass(cls, NamedJudge) and find_judge(name) == (cls, {}) for name, cls in shipped.items())


def test_judges_are_loaded_by_name(tiny_clip: Path, tiny_llava: Path, emoji20: ConceptSet) -> None:
    assert load_judge("clip", {"model": str(tiny_clip)}, emoji20).name == f"clip {tiny_clip} emoji20"
    llava = load_judge("llava", {"model": str(tiny_llava), "dtype": "float32"}, emoji20)
    assert llava.name == f"llava {tiny_llava} float32"
    less_sure = load_judge("llava", {"model": str(tiny_llava), "dtype": "float32", "min_answer": 0.5}, emoji20)
    assert less_sure.name == f"llava {tiny_llava} float32 min_answer=0.5"  # it leaves other pictures out
    assert load_judge("emoji", {}, emoji20).name == "emoji-cnn"


def test_a_folder_is_a_classifier(tmp_path: Path, emoji20: ConceptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    JudgeTraining(width=8).save_pretrained(tmp_path / "judge")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in (str(tmp_path / "judge"), "~/judge"):
        made = load_judge(name, {}, emoji20)
        assert type(made) is ClassifierJudge
        assert made.path == tmp_path / "judge"
    by_class = load_judge("lit_unlearn.judges.classifier.ClassifierJudge", {"path": str(tmp_path / "judge")}, emoji20)
    assert isinstance(by_class, ClassifierJudge)


def test_somebody_s_own_judge_needs_no_change_of_ours(mine: Path, emoji20: ConceptSet) -> None:
    judge = load_judge("my_judges.Plain", {"threshold": "0.4", "mode": "amax"}, emoji20)
    assert (judge.name, judge.mode) == ("plain 0.4", "amax")  # type: ignore[attr-defined]
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.3, 0.5)])
    assert judge_questions(judge, images, ["any"] * 2).tolist() == [0.0, 1.0]
    dogs = load_judge("my_judges.OnlyDogs", {}, emoji20, [emoji20.get("dog")])
    assert dogs.concepts is emoji20  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        (
            "gpt",
            {},
            "judge='gpt' is no judge and no folder: take clip, emoji, emoji_second, llava, nudenet, the folder of",
        ),
        ("lava", {}, r"judge='lava' is no judge and no folder \(closest: llava\)\."),
        ("logs/none", {}, "judge='logs/none' is no judge and no folder"),
        ("", {}, "judge='' is no judge and no folder"),
        (
            "no_package.Judge",
            {},
            "judge='no_package.Judge' cannot be imported: there is no no_package; install it, or add",
        ),
        ("my_judges.Plian", {"threshold": 1}, r"my_judges has no class Plian \(closest: Plain\)"),
        ("my_judges.function", {}, "judge='my_judges.function' is no class but function"),
        ("my_judges.Empty", {}, r"judge='my_judges.Empty' is no judge: it needs a __call__\(images, questions\)"),
        ("lit_unlearn.judges.base.NamedJudge", {}, "NamedJudge' is no judge"),
        ("functools.partial", {}, "judge='functools.partial' is no judge: it needs a __call__"),
        ("~nobody/judge", {}, "judge='~nobody/judge' is no judge and no folder"),
        ("x" * 5000, {}, "is no judge and no folder"),
        ("broken_judges.X", {}, r"judge='broken_judges.X' cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("leaving_judges.X", {}, r"judge='leaving_judges.X' cannot be imported \(SystemExit: 0\)"),
        ("my_judges.Plain", {}, "judge_options.threshold is missing: my_judges.Plain needs it"),
        ("my_judges.Plain", {"threshold": "much"}, "judge_options.threshold: float expected, got much"),
        ("my_judges.Plain", {"threshold": 1, "mode": "sum"}, "judge_options.mode: one of "),
        (
            "my_judges.Plain",
            {"treshold": 1},
            "judge_options.treshold is unknown to my_judges.Plain: it has threshold, mode",
        ),
        ("my_judges.OnlyDogs", {"concepts": 1}, "judge_options.concepts is unknown to my_judges.OnlyDogs: it has none"),
        (
            "my_judges.OnlyDogs",
            {},
            r"cannot answer 'Is there an apple.* \(it answers only 'Is there a dog in this pict",
        ),
        ("emoji", {"batch_size": 2}, "judge_options.batch_size is unknown to emoji: it has none"),
        ("llava", {"dtyp": "x"}, "judge_options.dtyp is unknown to llava: it has model, revision, dtype"),
        ("llava", {"dtype": "int8"}, "judge_options.dtype='int8' is unknown"),
        ("llava", {"batch_size": "many"}, "judge_options.batch_size: int expected, got many"),
        ("llava", {"batch_size": 0}, "judge_options.batch_size=0 must be at least 1"),
        ("clip", {"batch_size": 0}, "judge_options.batch_size=0 must be at least 1"),
        ("clip", {"model": "./nowhere"}, "judge_options.model='./nowhere' is no folder and no hub id"),
        ("llava", {"min_answer": 1.0}, r"judge_options.min_answer=1.0 must lie in \[0, 1\)"),
    ],
)
def test_a_judge_that_cannot_be_had(
    judge: str, options: dict[str, Any], message: str, emoji20: ConceptSet, mine: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check_judge_name(judge, options, emoji20)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        ("llava", {"load_in_4bit": True}, r"load_in_4bit needs bitsandbytes: pip install 'lit-unlearn\[llava\]'"),
        ("llava", {"device_map": "auto"}, r"device_map needs accelerate: pip install 'lit-unlearn\[llava\]'"),
        ("nudenet", {}, r"judge='nudenet' .*AGPL.* needs nudenet: pip install 'lit-unlearn\[nudenet\]'"),
    ],
)
def test_a_missing_package_says_which_extra_brings_it(
    judge: str, options: dict[str, Any], message: str, emoji20: ConceptSet, nothing_installed: None
) -> None:
    with pytest.raises(ValueError, match=message):
        check_judge_name(judge, options, emoji20, asked=[])


# --- questions


def test_a_question_that_a_judge_does_not_know_names_those_that_do(
    emoji20: ConceptSet, paper20: ConceptSet, nothing_installed: None
) -> None:
    with pytest.raises(JudgeError) as refused:
        check_judge_name("emoji", {}, paper20)
    assert str(refused.value) == (
        "judge='emoji' cannot answer 'Does this picture show the northern lights?', which AuroraBorialis of paper20 "
        "asks, nor 17 other questions of it: take judge=clip or llava, or a classifier or class of your own that knows "
        "them."
    )
    with pytest.raises(
        JudgeError, match=r"second_judge='nudenet' .*only.*take second_judge=clip or emoji or emoji_second or llava, or"
    ):
        check_judge_name("nudenet", {}, emoji20, field="second_judge")
    assert check_judge_name("emoji", {}, emoji20) is EmojiJudge


def test_only_what_will_be_asked_counts(emoji20: ConceptSet, paper20: ConceptSet) -> None:
    known = {concept.question for concept in emoji20.concepts.values()}
    asked = [concept for concept in paper20.concepts.values() if concept.question in known]
    assert 0 < len(asked) < len(paper20.concepts)
    check_judge_name("emoji", {}, paper20, asked)
    with pytest.raises(JudgeError, match="cannot answer"):
        check_judge_name("emoji", {}, paper20)


def test_a_question_in_other_words_says_the_closest(tmp_path: Path, emoji20: ConceptSet) -> None:
    JudgeTraining(width=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["questions"]["Is there a dog in this picture?"]
    config["questions"]["Is there a dog in the picture?"] = ["subject", "dog"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        JudgeError, match=r"'Is there a dog in this picture\?' \(closest: 'Is there a dog in the picture\?'\)"
    ):
        check_judge_name(str(tmp_path), {}, emoji20)


@pytest.mark.parametrize(
    "change",
    [
        {"questions": {"Is there a dog in this picture?": ["subject", "unicorn"]}},
        {"questions": {"Is there a dog in this picture?": ["colour", "dog"]}},
        {"questions": {"Is there a dog in this picture?": "dog"}},
        {"questions": None},
        {"width": "wide"},
        {"attributes": ["subject"]},
    ],
)
def test_a_classifier_s_config_is_read_before_its_weights(
    change: dict[str, Any], tmp_path: Path, emoji20: ConceptSet
) -> None:
    JudgeTraining(width=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be read \(its config.json: .*\): copy it again"):
        check_judge_name(str(tmp_path), {}, emoji20)


def test_weights_of_another_classifier_are_refused(tmp_path: Path, emoji20: ConceptSet) -> None:
    for name, width in (("judge", 8), ("other", 16)):
        JudgeTraining(width=width).save_pretrained(tmp_path / name)
    (tmp_path / "other/model.safetensors").replace(tmp_path / "judge/model.safetensors")
    with pytest.raises(JudgeError, match=r"judge='.*judge' cannot be read \(.*size mismatch.*copy it again"):
        load_judge(str(tmp_path / "judge"), {}, emoji20)


# --- loading


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("Nameless", "judge='my_judges.Nameless' has no name: set self.name"),
        ("NeedsMore", r"judge='my_judges.NeedsMore' cannot be loaded \(No module named 'a_package_that_nobody_has'\)"),
        ("Picky", "threshold=0.5 is too high: take less"),
    ],
)
def test_an_own_judge_that_cannot_be_made_is_one_sentence(
    judge: str, message: str, mine: Path, emoji20: ConceptSet
) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(f"my_judges.{judge}", {}, emoji20)


def test_an_own_judge_that_returns_no_tensor_is_named(mine: Path, emoji20: ConceptSet) -> None:
    with pytest.raises(JudgeError, match=r"'plain 0.5' returned list for 1 pictures; .* a tensor of shape \(1,\)"):
        judge_questions(load_judge("my_judges.Lists", {}, emoji20), torch.zeros(1, 3, 2, 2), ["any"])


def test_the_cache_of_an_own_judge_goes_with_its_options_and_its_code(mine: Path) -> None:
    versions = {cache_version("my_judges.Plain", {"threshold": value}) for value in (0.4, 0.4, 0.5)}
    assert len(versions) == 2
    mine.write_text(MINE.replace("> self.threshold", ">= self.threshold"), encoding="utf-8")
    assert cache_version("my_judges.Plain", {"threshold": 0.4}) not in versions
    assert cache_version("clip", {"batch_size": 3}) == ""  # its name says what its answers depend on


def test_answers_of_slow_judges_are_kept_and_of_quick_ones_not(mine: Path, tmp_path: Path, emoji20: ConceptSet) -> None:
    images = torch.full((1, 3, 4, 4), 0.45)
    for threshold, answer in ((0.4, 1.0), (0.5, 0.0), (0.4, 1.0)):
        judge = load_cached_judge("my_judges.Plain", {"threshold": threshold}, emoji20, tmp_path / "kept")
        assert judge(images, ["any"]).tolist() == [answer]
    assert isinstance(judge, CachedJudge)
    assert judge.asked == 0  # the third time it was known
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert isinstance(load_cached_judge("emoji", {}, emoji20, tmp_path / "kept"), EmojiJudge)
    assert not isinstance(load_cached_judge("my_judges.Plain", {"threshold": 1}, emoji20, None), CachedJudge)


# --- what a file says


def test_a_checkpoint_s_judge_runs_no_code_that_is_not_ours(mine: Path, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for judge in ("emoji", "clip", "lit_unlearn.judges.clip.ClipJudge", "logs/judge", str(tmp_path)):
        check_stored(judge, {}, file)
    for judge in ("my_judges.Plain", "lit_unlearn.judges.load.Path", "os.system"):
        with pytest.raises(
            ValueError, match=rf"names the judge '{judge}', whose code is not part .*--judge {judge} if"
        ):
            check_stored(judge, {}, file)
    for judge, options in ((5, {}), (None, {}), ("clip", [1])):
        with pytest.raises(ValueError, match=r"last.ckpt names no judge: give one with --judge"):
            check_stored(judge, options, file)
    assert "my_judges" not in sys.modules


def test_without_a_set_no_question_is_asked() -> None:
    assert check_judge_name("emoji", {}, None) is EmojiJudge
    with pytest.raises(ValueError, match="judge='clip' needs a concept set, and here is none"):
        check_judge_name("clip", {}, None)
