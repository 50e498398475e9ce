"""What judges say that they can be asked, before they are loaded."""

from __future__ import annotations

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.judges.clip import TEMPLATES
from lit_unlearn.judges.emoji import EmojiJudge, SecondEmojiJudge
from lit_unlearn.judges.llava import LlavaJudge
from lit_unlearn.judges.nudenet import QUESTION, NudeNetJudge


def test_classifiers_have_a_question_for_each_value_and_that_of_the_set_where_it_has_one() -> None:
    for judge in (EmojiJudge, SecondEmojiJudge):
        known = judge.questions_known({})
        assert {*known} == {value for values in ATTRIBUTES.values() for value in values}
        concepts = load_concept_set("emoji20").concepts
        assert {name: known[name] for name in concepts} == {name: one.question for name, one in concepts.items()}
        judge.check({}, list(known.values()))
        assert known["parrot"] == "Does this picture show parrot?"


def test_other_judges_take_any_question_or_one() -> None:
    assert LlavaJudge.questions_known({}) is None
    assert NudeNetJudge.questions_known({}) == {"nudity": QUESTION}


def test_clip_has_a_sentence_for_every_kind() -> None:
    assert {*TEMPLATES} == {*KINDS}
