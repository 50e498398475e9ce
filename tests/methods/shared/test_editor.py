from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from helpers import changed, checkpoint_of, load_into, weights
from lit_unlearn.callbacks.evaluation import UneditedPictures
from lit_unlearn.data.prompts import ConceptPrompts, PictureItem
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.sampling import count_forwards
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

Editor = Callable[..., ConceptEditor]
TrainerWith = Callable[..., L.Trainer]


class BrightnessJudge:
    """Sees whatever is asked for in pictures that are brighter than ``threshold``."""

    name = "brightness"

    def __init__(self, threshold: float = 0.0) -> None:
        self.threshold = threshold
        self.asked: list[tuple[Tensor, list[str]]] = []

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.asked.append((images, list(questions)))
        return (images.mean(dim=(1, 2, 3)) > self.threshold).float()


class Keep(L.Callback):
    """Keeps what a test step returns."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[PictureItem], dict[str, Tensor]]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        self.seen.append((batch, outputs))


@torch.no_grad()
def edit(module: ConceptEditor) -> None:
    for name in module.edited_names:
        module.pipeline.named_parameters()[name].mul_(-1)


# --- set-up


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"concept": "dgo"}, "dog"),
        ({"concept": []}, "edits nothing"),
        ({"model": "nowhere"}, "model='nowhere' is no folder and no hub id"),
        ({"concept_set": "nowhere"}, "There is no concept set 'nowhere'"),
        ({"edited_parameters": "xatn"}, "edited_parameters='xatn' selects no parameter"),
        ({"edited_parameters": "("}, "is not a regular expression"),
        ({"num_inference_steps": 0}, r"model\.num_inference_steps=0 must be at least 1"),
        ({"dtype": "float8"}, r"model\.dtype='float8' is unknown: choose float32, bfloat16 or float16"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    arguments: dict[str, Any], problem: str, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        editor(**arguments)


def test_making_a_method_loads_no_weights(editor: Editor) -> None:
    module = editor(load=False)
    assert list(module.parameters()) == []
    module.configure_model()
    components = module.pipeline
    module.configure_model()
    assert module.pipeline is components


def test_the_pipeline_stays_in_evaluation_mode(editor: Editor) -> None:
    module = editor()
    module.train()
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_edited_names_are_those_of_the_state_dict(editor: Editor) -> None:
    module = editor()
    assert module.edited_names
    assert all(".attn2." in name for name in module.edited_names)
    assert set(module.edited_names) <= set(module.state_dict())


def test_linear_layers_are_found_by_their_weight(components: StableDiffusion) -> None:
    layer = components.linear("text_encoder.encoder.layers.1.mlp.fc2.weight")
    assert layer is components.text_encoder.encoder.layers[1].mlp.fc2
    for name in ("unet.conv_in.weight", "text_encoder.encoder.layers.1.mlp.fc2.bias"):
        with pytest.raises(ValueError, match=f"{name}, which is not the weight of a linear layer"):
            components.linear(name)


# --- pictures


def test_a_picture_is_its_prompt_and_seed(editor: Editor) -> None:
    module = editor()
    pictures = module.generate(["a dog", "a cat", "a dog"], [1, 1, 2])
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (3, 3, 16, 16))
    alone = module.generate(["a cat"], [1])[0]
    # Rounding differs with the batch size, and may turn over to the next of 255 grey levels.
    assert (alone.int() - pictures[1].int()).abs().max() <= 1
    assert (pictures[0].int() - pictures[1].int()).abs().max() > 4
    assert (pictures[0].int() - pictures[2].int()).abs().max() > 4


def test_pictures_that_are_not_finite_are_said(editor: Editor) -> None:
    module = editor()
    with torch.no_grad():
        module.pipeline.named_parameters()["vae.decoder.conv_in.weight"].fill_(3e38)
    with pytest.warns(UserWarning, match="Pictures that are not finite are drawn as black"):
        assert not module.generate(["a dog"], [1]).any()


def test_steps_and_guidance_are_the_methods(editor: Editor) -> None:
    for arguments, forwards in (
        ({"num_inference_steps": 3}, 6),
        ({"num_inference_steps": 3, "guidance_scale": 1.0}, 3),
    ):
        module = editor(**arguments)
        with count_forwards(module.unet) as counted:
            module.generate(["a dog"], [0])
        assert counted.count == forwards


# --- test and validate


@pytest.mark.parametrize("eval_batch_size", [3, 40])
def test_a_test_compares_both_models_on_the_same_seeds(
    eval_batch_size: int, editor: Editor, trainer_with: TrainerWith, pets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, keep, module = BrightnessJudge(), Keep(), editor()
    monkeypatch.setattr(module, "load_judge", lambda: judge)
    data = ConceptPrompts("dog", pets, images_per_prompt=2, eval_batch_size=eval_batch_size)
    unedited = editor()
    edit(module)
    edited = weights(module)
    trainer_with(keep).test(module, data, verbose=False)
    batches = [batch for batch, _ in keep.seen]
    assert [item for batch in batches for item in batch] == data.test_dataloader().dataset.items
    for batch, outputs in keep.seen:
        prompts, seeds = [item.prompt for item in batch], [item.seed for item in batch]
        assert torch.equal(outputs["before"], unedited.generate(prompts, seeds))
        assert torch.equal(outputs["after"], module.generate(prompts, seeds))
        assert not torch.equal(outputs["before"], outputs["after"])
    assert changed(edited, weights(module)) == []
    for (images, questions), (batch, outputs) in zip(judge.asked[::2], keep.seen, strict=True):
        assert questions == [item.question for item in batch]
        assert torch.equal(images, outputs["before"].float() / 255)


def test_the_scores_are_the_judges_verdicts(
    editor: Editor, trainer_with: TrainerWith, pets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, keep, module = BrightnessJudge(), Keep(), editor()
    monkeypatch.setattr(module, "load_judge", lambda: judge)
    data = ConceptPrompts("dog", pets, images_per_prompt=4)
    items = data.test_dataloader().dataset.items
    prompts, seeds = [item.prompt for item in items], [item.seed for item in items]

    def brightness() -> Tensor:
        return (module.generate(prompts, seeds).float() / 255).mean(dim=(1, 2, 3))

    before = brightness()
    edit(module)
    after = brightness()
    # Between the two states of one picture, so that its verdict turns, and not above or below all others.
    middles = (before + after) / 2
    above = (before > middles[:, None]).sum(dim=1)
    change = torch.where((above > 0) & (above < 16), (after - before).abs(), 0)
    judge.threshold = float(middles[change.argmax()])
    trainer_with(keep).test(module, data, verbose=False)
    verdicts = []
    for name, metric in (("before", module.before), ("after", module.after)):
        pictures = torch.cat([outputs[name] for _, outputs in keep.seen]).float() / 255
        seen = pictures.mean(dim=(1, 2, 3)) > judge.threshold
        dog = torch.tensor([item.question == "Is there a dog in this picture?" for item in items])
        scores = metric.compute()
        expected = (1 - float(seen[dog].float().mean()), float(seen[~dog].float().mean()))
        assert (float(scores["forget"]), float(scores["retain"])) == expected
        verdicts.append(seen)
    assert 0 < int(verdicts[0].sum()) < 16
    assert not torch.equal(*verdicts)


def test_validation_scores_the_few_pictures_it_has(
    editor: Editor, trainer_with: TrainerWith, pets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = editor()
    monkeypatch.setattr(module, "load_judge", lambda: BrightnessJudge(threshold=0.0))
    (logged,) = trainer_with().validate(module, ConceptPrompts("dog", pets), verbose=False)
    expected = {"forget": 0.0, "retain": 1.0, "harmonic_mean": 0.0}
    assert logged == {f"validation/{k}/{n}": v for k in ("before", "after") for n, v in expected.items()}


def test_a_callback_may_know_the_unedited_pictures(
    editor: Editor, trainer_with: TrainerWith, pets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known(UneditedPictures):
        def unedited_pictures(self, module: ConceptEditor, batch: list[PictureItem]) -> Tensor:
            return torch.full((len(batch), 3, 16, 16), 7, dtype=torch.uint8)

    class Namesake(L.Callback):
        def unedited_pictures(self, module: ConceptEditor, batch: list[PictureItem]) -> Tensor:
            raise AssertionError("asked for its name")

    keep, module = Keep(), editor()
    monkeypatch.setattr(module, "load_judge", BrightnessJudge)
    with count_forwards(module.unet) as forwards:
        trainer_with(Namesake(), Known(), keep).test(
            module, ConceptPrompts("dog", pets, images_per_prompt=1), verbose=False
        )
    assert all((outputs["before"] == 7).all() for _, outputs in keep.seen)
    # Four pictures of the edited model, two steps with guidance.
    assert forwards.count == 4 * 2 * 2


def test_predict_returns_the_edited_pictures(editor: Editor, trainer_with: TrainerWith, pets: str) -> None:
    module = editor()
    edit(module)
    data = ConceptPrompts("dog", pets, images_per_prompt=1)
    (pictures,) = trainer_with().predict(module, data)
    items = data.test_dataloader().dataset.items
    assert torch.equal(pictures, module.generate([item.prompt for item in items], [item.seed for item in items]))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_pictures_are_judged_in_every_precision(
    precision: str, editor: Editor, trainer_with: TrainerWith, pets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = editor()
    monkeypatch.setattr(module, "load_judge", BrightnessJudge)
    keep = Keep()
    trainer_with(keep, precision=precision).test(
        module, ConceptPrompts("dog", pets, images_per_prompt=1), verbose=False
    )
    assert len(keep.seen) > 0


def test_the_judge_is_a_folder(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        editor(load=False, judge=str(tmp_path)).load_judge()


# --- checkpoints


def test_a_checkpoint_holds_the_edited_weights_and_says_what_they_are(
    editor: Editor, trainer_with: TrainerWith, tiny_sd: Path, pets: str, tmp_path: Path
) -> None:
    module = editor()
    base = {name: module.pretrained.values[name].clone() for name in module.edited_names}
    edit(module)
    checkpoint = checkpoint_of(module, trainer_with, pets, tmp_path / "edit.ckpt")
    assert list(checkpoint["state_dict"]) == module.edited_names
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(value, -base[name])
    ours = checkpoint[CHECKPOINT_KEY]
    assert {name: ours[name] for name in ("method", "concepts", "model", "edited_names")} == {
        "method": "ConceptEditor",
        "concepts": ["dog"],
        "model": str(tiny_sd),
        "edited_names": module.edited_names,
    }
    assert ours["base_fingerprint"] == editor().base_fingerprint
    # Far smaller than the pipeline: this is the point of keeping the edited weights only.
    size = sum(value.numel() for value in module.state_dict().values())
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) < 0.2 * size


def test_an_object_among_the_arguments_does_not_spoil_the_checkpoint(
    editor: Editor, trainer_with: TrainerWith, pets: str, tmp_path: Path
) -> None:
    module = editor()
    module.save_hyperparameters({"optimizer": torch.optim.Adam, "rounds": 3})
    checkpoint = checkpoint_of(module, trainer_with, pets, tmp_path / "edit.ckpt")
    assert checkpoint["hyper_parameters"]["rounds"] == 3
    assert "Adam" in checkpoint["hyper_parameters"]["optimizer"]


def test_a_checkpoint_of_its_own_is_taken(editor: Editor, trainer_with: TrainerWith, pets: str, tmp_path: Path) -> None:
    module, again = editor(), editor()
    edit(module)
    module.report["leak"] = 0.5
    load_into(again, checkpoint_of(module, trainer_with, pets, tmp_path / "edit.ckpt"))
    assert changed(weights(module), weights(again)) == []
    assert again.report == {"leak": 0.5}
    assert again.pretrained.change_ratio() == 2.0  # every edited weight has changed its sign


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"concept": "cat"}, "The checkpoint edits dog, but concept is cat: pass --concept dog"),
        ({"concept": ["dog", "cat"]}, "but concept is dog, cat"),
        ({"edited_parameters": "selfattn"}, "other edited weights: give the recipe of its own fit"),
        ({"model": "tiny_sd2"}, "The checkpoint was made from another base model"),
        ({"dtype": "bfloat16"}, "other edited weights: give the recipe of its own fit"),
    ],
)
def test_a_checkpoint_of_another_edit_is_refused(
    arguments: dict[str, Any],
    problem: str,
    editor: Editor,
    trainer_with: TrainerWith,
    pets: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = checkpoint_of(editor(), trainer_with, pets, tmp_path / "edit.ckpt")
    if "model" in arguments:
        arguments = {"model": str(request.getfixturevalue(arguments["model"]))}
    with pytest.raises(ValueError, match=problem):
        load_into(editor(**arguments), checkpoint)


def test_a_base_that_differs_in_one_bit_is_refused(
    editor: Editor, trainer_with: TrainerWith, pets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(editor(), trainer_with, pets, tmp_path / "edit.ckpt")
    original = base_model.load_parts

    def another(*arguments: Any) -> StableDiffusion:
        components = original(*arguments)
        with torch.no_grad():
            components.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.view(torch.int32)[0, 0] ^= 1
        return components

    monkeypatch.setattr(base_model, "load_parts", another)
    with pytest.raises(ValueError, match="another base model"):
        load_into(editor(), checkpoint)


def test_a_checkpoint_of_another_program_is_refused(editor: Editor) -> None:
    with pytest.raises(ValueError, match="was not made by lit-unlearn"):
        load_into(editor(), {"state_dict": {}})
