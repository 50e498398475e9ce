"""The report of a test, on a random pipeline and a judge that says yes by the redness of a picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor

from helpers import moved, score
from lit_unlearn.callbacks.evaluation import EvaluationGrid, EvaluationReport, UneditedPictures
from lit_unlearn.data.prompts import ConceptPrompts, PictureItem, Pictures
from lit_unlearn.evaluation.grids import Section, sheet
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.evaluation.verdict import verdict_of
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.files import WriteError
from lit_unlearn.system.pixels import save_png


class RednessJudge:
    """Says yes to pictures whose mean red is at least ``threshold``."""

    name = "redness"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        return (images[:, 0].mean(dim=(1, 2)) >= self.threshold).float()


@pytest.fixture
def edited(refinement: Callable[..., ValueRefinement]) -> ValueRefinement:
    """A module whose edited weights have moved, and whose judge is a ``RednessJudge`` that is of two minds."""
    return of_two_minds(moved(refinement(), lambda: None))


def of_two_minds(module: ValueRefinement) -> ValueRefinement:
    """``module`` with a ``RednessJudge`` that says yes to some of its pictures and no to others."""
    items = Pictures(module.concepts, 2, 0).items
    pictures = module.generate([item.prompt for item in items], [item.seed for item in items])
    levels = pictures[:, 0].float().mean(dim=(1, 2)).sort().values[1:-1] / 255
    # In the widest gap, so that rounding cannot turn a verdict, with pictures on either side of it.
    place = int(levels.diff().argmax())
    threshold = float(levels[place] + levels[place + 1]) / 2
    module.load_judge = lambda: RednessJudge(threshold)  # type: ignore[method-assign]
    return module


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_scores_are_those_of_the_pictures(edited: ValueRefinement, tmp_path: Path) -> None:
    score(edited, tmp_path, EvaluationReport(), images_per_prompt=2)
    scores = Scores.load(tmp_path / "scores.json")
    items, names = Pictures(edited.concepts, 2, 0).items, list(edited.concepts.concepts)
    after = edited.generate([i.prompt for i in items], [i.seed for i in items])
    with edited.pretrained.restored():
        before = edited.generate([i.prompt for i in items], [i.seed for i in items])
    assert not torch.equal(before, after)
    for pictures, found in ((before, scores.before), (after, scores)):
        yes = pictures[:, 0].float().mean(dim=(1, 2)) / 255 >= edited.load_judge().threshold
        is_dog = torch.tensor([names[item.concept_index] == "dog" for item in items])
        assert found is not None
        assert found.forget == pytest.approx(1 - yes[is_dog].float().mean().item())
        assert found.retain == pytest.approx(yes[~is_dog].float().mean().item())
    others = torch.tensor([names[item.concept_index] != "dog" for item in items])
    change = ((after - before.float())[others] / 255).square().mean(dim=(1, 2, 3)).sqrt()
    assert scores.drift is not None
    assert scores.drift["rmse"] == pytest.approx(change.mean().item(), abs=1e-5)
    assert scores.drift["pictures"] == int(others.sum())
    assert scores.edited == ["dog"]
    assert scores.images_per_concept == 4


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_the_spontaneous_rate_is_that_of_retained_pictures(edited: ValueRefinement, tmp_path: Path) -> None:
    edited.spontaneous = True
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    score(edited, tmp_path, EvaluationReport(), logger=logger, images_per_prompt=2)
    scores = Scores.load(Path(logger.log_dir) / "scores.json")
    # This judge looks at the picture and not at the question, so it sees the dog where it sees the cat; and no prompt
    # of the cat names the dog.
    assert scores.before is not None
    for found in (scores, scores.before):
        assert found.spontaneous == found.retain == found.per_concept["dog"].share_spontaneous
        assert found.intervals["spontaneous"] == pytest.approx(found.intervals["retain"])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("test/spontaneous")[-1].value == pytest.approx(scores.spontaneous)
    assert events.Scalars("test/before/spontaneous")[-1].value == pytest.approx(scores.before.spontaneous)
    edited.spontaneous = None  # this judge is slow
    score(edited, tmp_path / "other", EvaluationReport(), images_per_prompt=1)
    assert Scores.load(tmp_path / "other" / "scores.json").spontaneous is None


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_grid_is_a_picture(edited: ValueRefinement, tmp_path: Path) -> None:
    score(edited, tmp_path, EvaluationReport(columns=2), images_per_prompt=1)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 100
        assert grid.height > 100
        assert len(grid.convert("RGB").getcolors(maxcolors=1_000_000) or []) > 50


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[str], Sequence[Section]]]:
    """Title, sentences and sections of every sheet that is drawn."""
    found: list[tuple[str, Sequence[str], Sequence[Section]]] = []

    def noted(title: str, lines: Sequence[str], sections: Sequence[Section], **how: Any) -> Image.Image:
        found.append((title, lines, sections))
        return sheet(title, lines, sections, **how)

    for module in ("sheets", "evaluation"):
        monkeypatch.setattr(f"lit_unlearn.callbacks.{module}.sheet", noted)
    return found


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_grid_has_title_headings_and_the_judge_s_verdicts(
    refinement: Callable[..., ValueRefinement], pets: str, tmp_path: Path, sheets: list[Any]
) -> None:
    content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
    content["concepts"]["dog"]["adversarial"] = ["dgo brks ltr"]
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    edited = of_two_minds(moved(refinement(concept_set=str(path)), lambda: None))
    score(edited, tmp_path, EvaluationReport(), images_per_prompt=1)
    scores, dog = Scores.load(tmp_path / "scores.json"), edited.concepts.concepts["dog"]
    ((title, lines, (of_dog, adversarial, others)),) = sheets
    assert title == "dog edited by ValueRefinement"
    assert [*lines[:-1]] == verdict_of(scores).lines and "redness" in lines[-1]
    assert of_dog.heading == "Edited: dog"
    assert "misspelt on purpose" in adversarial.heading
    assert others.heading == "Other concepts"
    assert (tuple(of_dog.titles), adversarial.titles) == (dog.prompts, ["dgo brks ltr"])
    # Under each picture stands what the judge says of that picture.
    threshold = edited.load_judge().threshold
    for section, name in ((of_dog, "dog"), (adversarial, "dog"), (others, "cat")):
        for pictures, notes in zip((section.before, section.after), section.notes, strict=True):
            yes = pictures[:, 0].mean(dim=(1, 2)) >= threshold
            assert list(notes) == [f"judge: {name}" if one else f"judge: no {name}" for one in yes]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 2 * 3 * 96


@pytest.mark.parametrize("own", [None, ["a house"]])
def test_pictures_of_a_fit_have_headings(
    own: list[str] | None,
    refinement: Callable[..., ValueRefinement],
    trainer_with: Callable[..., L.Trainer],
    sheets: list[Any],
    tmp_path: Path,
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    trainer = trainer_with(EvaluationGrid(prompts=own), logger=logger, max_epochs=1, limit_val_batches=0)
    module = refinement(values="target")
    trainer.fit(module, ConceptPrompts("dog", module.hparams["concept_set"], steps=2))
    (first, *_), (last, *_) = sheets
    assert first == "dog edited by ValueRefinement, after 0 steps" != last
    expected = ["Prompts of the recipe"] if own else ["Edited: dog", "Other concepts"]
    assert [[section.heading for section in sections] for *_, sections in sheets] == [expected, expected]
    prompts = [prompt for section in sheets[0][2] for prompt in section.titles]
    assert prompts == (own or ["one dog", "the pet that barks", "one cat"])


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_scores_do_not_depend_on_batch_size(edited: ValueRefinement, tmp_path: Path) -> None:
    found = []
    for size in (1, 3):
        score(edited, tmp_path / str(size), EvaluationReport(), images_per_prompt=2, eval_batch_size=size)
        found.append(Scores.load(tmp_path / str(size) / "scores.json"))
    assert found[0].per_concept == found[1].per_concept
    assert found[0].before == found[1].before


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_unedited_pictures_are_made_once(edited: ValueRefinement, tmp_path: Path) -> None:
    cache, counts = tmp_path / "unedited", [edited.forwards.count]
    for run in ("first", "second"):
        score(edited, tmp_path / run, UneditedPictures(str(cache)), EvaluationReport(), images_per_prompt=1)
        counts.append(edited.forwards.count)
    first, second = (after - before for before, after in pairwise(counts))
    assert second == first / 2  # only the edited model's pictures are made
    assert len(list(cache.rglob("*.png"))) == 4
    results = [Scores.load(tmp_path / name / "scores.json") for name in ("first", "second")]
    assert results[0].before == results[1].before


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_a_cache_that_is_deleted_in_the_middle(edited: ValueRefinement, tmp_path: Path) -> None:
    class Deleted(UneditedPictures):
        """Loses its folder before each batch."""

        def __init__(self, folder: Path) -> None:
            super().__init__(str(folder))
            self.lost: list[int] = []

        def unedited_pictures(self, module: ConceptEditor, batch: list[PictureItem]) -> Tensor:
            self.lost.append(len(list(self.folder.rglob("*.png"))))
            shutil.rmtree(self.folder, ignore_errors=True)
            return super().unedited_pictures(module, batch)

    deleted = Deleted(tmp_path / "unedited")
    for name, callback in (("first", UneditedPictures(str(tmp_path / "other"))), ("second", deleted)):
        score(edited, tmp_path / name, callback, EvaluationReport(), images_per_prompt=1, eval_batch_size=1)
    assert deleted.lost == [0, 1, 1, 1]
    results = [Scores.load(tmp_path / name / "scores.json") for name in ("first", "second")]
    assert results[0].before == results[1].before
    assert results[0].per_concept == results[1].per_concept


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_pictures_that_cannot_be_kept_are_named(edited: ValueRefinement, tmp_path: Path) -> None:
    (tmp_path / "unedited").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match=r"Could not write .*/unedited/\w+/\w+\.png: .*a file stands where a folder"):
        score(edited, tmp_path, UneditedPictures(str(tmp_path / "unedited")), EvaluationReport(), images_per_prompt=1)
    assert (tmp_path / "unedited").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_damaged_cached_pictures_are_said_and_made_anew(
    edited: ValueRefinement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, said = tmp_path / "unedited", []  # type: tuple[Path, list[str]]
    score(edited, tmp_path / "first", UneditedPictures(str(cache)), EvaluationReport(), images_per_prompt=1)
    files = sorted(cache.rglob("*.png"))
    contents = [path.read_bytes() for path in files]
    damaged, stranger, foreign, changed = files
    damaged.write_bytes(contents[0][: len(contents[0]) // 2])
    save_png(stranger, Image.new("RGB", (8, 8)))  # a good picture, but nobody says what of
    foreign.write_bytes(contents[1])  # a picture of the cache under another's name
    place = contents[3].index(b"IDAT") + 20
    changed.write_bytes(contents[3][:place] + bytes([contents[3][place] ^ 255]) + contents[3][place + 1 :])
    monkeypatch.setattr("lit_unlearn.callbacks.evaluation.rank_zero_info", said.append)
    score(edited, tmp_path / "second", UneditedPictures(str(cache)), EvaluationReport(), images_per_prompt=1)
    assert [path.read_bytes() for path in files] == contents
    for path in files:
        assert sum(f"{path} is damaged (" in line and line.endswith("it is made anew.") for line in said) == 1
    results = [Scores.load(tmp_path / name / "scores.json") for name in ("first", "second")]
    assert results[0].before == results[1].before


def test_cache_tells_weights_and_settings_apart(refinement: Callable[..., ValueRefinement], tmp_path: Path) -> None:
    keys = set()
    for arguments in ({}, {"num_inference_steps": 2}, {"guidance_scale": 2.0}):
        module = refinement(**arguments)
        module.configure_model()
        keys.add(UneditedPictures(str(tmp_path))._make_key(module))
    with torch.no_grad():
        module.vae.decoder.conv_out.bias.add_(1e-3)
    keys.add(UneditedPictures(str(tmp_path))._make_key(module))
    assert len(keys) == 4


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_a_test_in_half_of_the_precision_reads_its_own_pictures(edited: ValueRefinement, tmp_path: Path) -> None:
    cache = UneditedPictures(str(tmp_path / "unedited"))
    found = []
    for precision in ("32-true", "bf16-mixed", "32-true", "bf16-mixed"):
        before = edited.forwards.count
        score(edited, tmp_path / str(len(found)), cache, EvaluationReport(), images_per_prompt=1, precision=precision)
        found.append(edited.forwards.count - before)
    assert found == [found[0], found[0], found[0] / 2, found[0] / 2]
    drawn = [Scores.load(tmp_path / str(number) / "scores.json").drawn for number in range(4)]
    assert [(one.precision, one.weights, one.num_inference_steps) for one in drawn if one] == [
        (precision, "float32", edited.num_inference_steps) for precision in ("32-true", "bf16-mixed") * 2
    ]
    folders = list((tmp_path / "unedited").iterdir())
    assert len(folders) == 2
    pictures = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert pictures[0].keys() == pictures[1].keys()
    assert pictures[0] != pictures[1]


def test_cache_key_is_of_the_unedited_weights(edited: ValueRefinement, tmp_path: Path) -> None:
    key = UneditedPictures(str(tmp_path))._make_key(edited)
    with edited.pretrained.restored():
        assert UneditedPictures(str(tmp_path))._make_key(edited) == key


def test_looking_at_pictures_is_not_counted(
    refinement: Callable[..., ValueRefinement], fit: Callable[..., L.Trainer]
) -> None:
    counts = []
    for callbacks in ((), (EvaluationGrid(every_n_epochs=1),)):
        module = refinement(values="target")
        fit(module, *callbacks)
        counts.append(module.forwards.count)
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_tensorboard_compares_runs_by_arguments_and_scores(edited: ValueRefinement, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    score(edited, tmp_path, EvaluationReport(), logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    found = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(found).session_start_info.hparams
    assert hparams["edited"].string_value == "dog"
    assert hparams["rounds"].number_value == edited.hparams["rounds"] == 1
    scores = Scores.load(Path(logger.log_dir) / "scores.json")
    assert events.Scalars("test/forget")[-1].value == pytest.approx(scores.forget)


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_the_agreement_of_two_judges_is_cohen_s_kappa(
    edited: ValueRefinement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts: dict[str, list[bool]] = {"every other": [], "every fourth": []}

    class Counting:
        """Sees the concept in one picture out of so many."""

        def __init__(self, name: str, period: int) -> None:
            self.name, self.period = name, period

        def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
            asked = len(verdicts[self.name])
            answers = [number % self.period == 0 for number in range(asked, asked + len(images))]
            verdicts[self.name] += answers
            return torch.tensor(answers).float()

    monkeypatch.setattr(edited, "load_judge", lambda: Counting("every other", 2))
    monkeypatch.setattr(edited, "_judge", lambda name, options: Counting("every fourth", 4))
    edited.second_judge_path = "another"
    score(edited, tmp_path, EvaluationReport(), images_per_prompt=3)
    pairs = list(zip(*verdicts.values(), strict=True))
    n = len(pairs)
    agree = sum(a == b for a, b in pairs) / n
    yes = [sum(column) / n for column in zip(*pairs, strict=True)]
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    agreement = Scores.load(tmp_path / "scores.json").agreement
    assert agreement is not None
    assert agreement["judge"] == "every fourth"
    assert agreement["cohen_kappa"] == pytest.approx((agree - chance) / (1 - chance), abs=1e-6)
    assert 0 < abs(agreement["cohen_kappa"]) < 1
