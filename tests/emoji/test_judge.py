from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.emoji.data import DrawingDataset
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.emoji.judge import JudgeTraining, emoji_questions
from lit_unlearn.judges.base import Judge, judge_questions
from lit_unlearn.judges.classifier import AttributeClassifier, ClassifierJudge
from lit_unlearn.judges.emoji import EmojiJudge, SecondEmojiJudge


@pytest.fixture(scope="module")
def training() -> JudgeTraining:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return JudgeTraining(width=8).eval()


@pytest.fixture
def folder(training: JudgeTraining, tmp_path: Path) -> Path:
    """A judge with random weights."""
    training.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_questions_are_those_of_emoji20_and_each_has_its_value() -> None:
    questions, concepts = emoji_questions(), load_concept_set("emoji20").concepts
    assert set(questions) == {concept.question for concept in concepts.values()}
    assert len(set(questions.values())) == len(questions) == 20
    kinds = {"object": "subject", "action": "subject", "style": "style", "scene": "scene"}
    for concept in concepts.values():
        assert questions[concept.question] == (kinds[concept.kind], concept.name)
        assert concept.name in ATTRIBUTES[kinds[concept.kind]]


def test_an_answer_is_the_probability_of_the_value_asked_for(training: JudgeTraining, folder: Path) -> None:
    judge, questions = ClassifierJudge(folder), emoji_questions()
    assert isinstance(judge, Judge)
    assert judge.name == "emoji-cnn"
    images = torch.rand(20, 3, 48, 48)
    answers = judge(images, list(questions))
    with torch.no_grad():
        logits = training.classifier(images * 2 - 1)
    for row, (attribute, value) in enumerate(questions.values()):
        expected = logits[attribute][row].softmax(0)[ATTRIBUTES[attribute].index(value)]
        assert_close(answers[row], expected, rtol=0, atol=1e-6)
    # What the heads say of one picture adds up to one.
    dog = images[:1].expand(4, -1, -1, -1)
    styles = [question for question, (attribute, _) in questions.items() if attribute == "style"]
    assert float(judge(dog, styles).sum()) == pytest.approx(1, abs=1e-5)


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    judge, questions = ClassifierJudge(folder), list(emoji_questions())
    images = torch.rand(20, 3, 48, 48)
    # Probabilities in float32; convolutions of other batch sizes round differently.
    assert_close(judge_questions(judge, images, questions, batch_size=3), judge(images, questions), rtol=0, atol=1e-5)


def test_a_picture_is_classified_once_for_all_questions(folder: Path) -> None:
    judge, seen = ClassifierJudge(folder), []  # type: ClassifierJudge, list[int]
    judge.classifier.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    questions = list(judge.questions)
    rows = [row for row in (3, 1, 0) for _ in questions]
    answers = judge.ask(images, rows, questions * 3)
    assert seen == [4]
    alone = torch.cat([judge(images[[row]].expand(len(questions), -1, -1, -1), questions) for row in (3, 1, 0)])
    torch.testing.assert_close(answers, alone, rtol=0, atol=1e-5)
    assert judge.ask(images, [], []).shape == (0,)


def test_the_judge_takes_any_size_of_picture(folder: Path) -> None:
    judge, question = ClassifierJudge(folder), next(iter(emoji_questions()))
    for side in (16, 48, 64):
        answer = judge(torch.rand(2, 3, side, side), [question] * 2)
        assert answer.shape == (2,)
        assert ((answer > 0) & (answer < 1)).all()
    assert judge.features(torch.rand(2, 3, 48, 48)).shape == (2, 8 * 8)


def test_a_second_judge_is_a_transformer_that_takes_any_size_of_picture(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        training = JudgeTraining(width=8, architecture="transformer").eval()
    training.save_pretrained(tmp_path)
    assert training.part == "second_judge"
    judge, question = ClassifierJudge(tmp_path), next(iter(emoji_questions()))
    assert judge.name == "emoji-transformer"
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in judge.classifier.modules())
    for side in (16, 48, 64):
        answer = judge(torch.rand(2, 3, side, side), [question] * 2)
        assert ((answer > 0) & (answer < 1)).all()
    assert judge.features(torch.rand(2, 3, 48, 48)).shape == (2, 8 * 8)
    # It sees where a patch lies: with the patches in another order, the answer is another.
    picture = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert (judge(picture, [question]) - judge(picture.flip(-1), [question])).abs() > 1e-4


@pytest.mark.parametrize("kind", [EmojiJudge, SecondEmojiJudge])
def test_both_judges_know_drawings_that_they_have_not_seen(kind: type[ClassifierJudge]) -> None:
    judge, right = kind(), []
    for item in DrawingDataset(60, "validation", seed=5):
        logits = judge.classifier(item["images"][None])
        right += [int(logits[name].argmax()) == int(item["labels"][i]) for i, name in enumerate(ATTRIBUTES)]
    assert sum(right) / len(right) > 0.95


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "mamba"}), encoding="utf-8")
    with pytest.raises(ValueError, match="architecture 'mamba' is none of convolution, transformer"):
        ClassifierJudge(folder)


def test_an_unknown_question_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="The judge 'emoji-cnn' cannot answer 'Is there a unicorn"):
        ClassifierJudge(folder)(torch.rand(1, 3, 48, 48), ["Is there a unicorn in this picture?"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"judge='{folder}' has no {name}"):
        ClassifierJudge(folder)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def break_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


@pytest.mark.parametrize("damage", [break_config, break_weights])
def test_a_corrupt_file_is_refused(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=rf"judge='{folder}' cannot be read .*copy it again"):
        ClassifierJudge(folder)


def test_the_saved_judge_is_the_trained_one(training: JudgeTraining, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["attributes"] == {name: list(values) for name, values in ATTRIBUTES.items()}
    classifier = AttributeClassifier(config["attributes"], config["width"])
    weights = load_file(folder / "model.safetensors")
    classifier.load_state_dict(weights)
    for name, value in training.classifier.state_dict().items():
        assert torch.equal(weights[name], value)
    save_file(weights, folder / "model.safetensors")
    ClassifierJudge(folder)


def test_augmentation_blurs_and_adds_noise_of_changing_strength(training: JudgeTraining) -> None:
    torch.manual_seed(0)
    images = torch.zeros(200, 3, 16, 16)
    noise = training.augment(images).std(dim=(1, 2, 3))
    # Standard deviations spread over 0 to 0.2.
    assert noise.min() < 0.02
    assert noise.max() > 0.18
    assert noise.max() < 0.22


def test_training_learns_what_the_labels_say() -> None:
    torch.manual_seed(0)
    module = JudgeTraining(width=8)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = DrawingDataset(32, "train")
    batch = torch.utils.data.default_collate([data[i] for i in range(32)])
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Chance is (log 16 + log 4 + log 5) / 3 = 1.92.
    assert losses[0] > 1.5
    assert losses[-1] < 0.7 * losses[0]
