from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from helpers import by_ridge_map
from lit_unlearn.core.uce import map_updates, shifted_by_attributes
from lit_unlearn.methods.uce_debias import UCEDebias

Fit = Callable[..., L.Trainer]
Build = Callable[..., UCEDebias]
EQUAL = [[0.5, 0.5], [0.5, 0.5]]


class ColourJudge:
    """Sees a cartoon where there is more red than green, gloss elsewhere, and the subject in every picture."""

    name = "colour"

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        red, green, _ = images.mean(dim=(2, 3)).unbind(1)
        cartoon = torch.sigmoid(100 * (red - green - 0.005))  # some dogs of the tiny model, no owl
        answers = {
            "Is this picture drawn in the style of a cartoon?": cartoon,
            "Is this picture drawn in the style of a glossy render?": 1 - cartoon,
        }
        subject = torch.ones(len(images))
        return torch.stack([answers.get(question, subject)[row] for row, question in enumerate(questions)])


@pytest.fixture
def debias(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Makes a ``UCEDebias`` of dogs and owls in ``tiny_sd``; takes the arguments that shall differ."""
    monkeypatch.setattr(UCEDebias, "load_judge", lambda self: ColourJudge())

    def build(**arguments: Any) -> UCEDebias:
        defaults = {
            "concept": ["dog", "owl"],
            "attributes": ["cartoon", "glossy"],
            "model": str(tiny_sd),
            "num_inference_steps": 1,
            "images_per_phrase": 6,
            "rounds": 2,
            "tolerance": 1e-6,
        }
        return UCEDebias(**{**defaults, **arguments})

    return build


def test_rounds_follow_the_measured_shares(debias: Build, fit: Fit) -> None:
    module = debias(step=0.5, ratios={"dog": [0.2, 0.8], "owl": [0.9, 0.1]})
    trainer = fit(module, by_ridge_map())
    rounds = module.report["rounds"]
    assert trainer.current_epoch == 2
    assert len(rounds) == 3  # the unedited model, and after each round
    wished = torch.tensor([[0.2, 0.8], [0.9, 0.1]], dtype=torch.float64)
    alphas = torch.zeros(2, 2, dtype=torch.float64)
    for before, after in pairwise(rounds):
        alphas = alphas + 0.5 * (wished - torch.tensor(before["ratios"], dtype=torch.float64))
        assert_close(torch.tensor(after["alphas"], dtype=torch.float64), alphas)
    assert rounds[0]["alphas"] == [[0.0, 0.0], [0.0, 0.0]]
    for found in rounds:
        # Shares of six pictures.
        assert all(share * 6 == pytest.approx(round(share * 6)) for shares in found["ratios"] for share in shares)
        assert [sum(shares) for shares in found["ratios"]] == pytest.approx([1.0, 1.0])
        assert found["subject_shown"] == [1.0, 1.0]
        assert found["largest_deviation"] == pytest.approx(
            float((torch.tensor(found["ratios"], dtype=torch.float64) - wished).abs().max())
        )


def test_rounds_do_not_pile_up(debias: Build, fit: Fit) -> None:
    """The weights are those of one solve from the pretrained ones with the last alphas."""
    module = debias(step=1.0, ratios=[0.1, 0.9], preserve_tokens="last_subject")
    fit(module, by_ridge_map())
    assert module.alphas.abs().min() > 1e-2
    assert not torch.equal(module.alphas, torch.tensor(module.report["rounds"][1]["alphas"]))
    pretrained = [module.pretrained.values[name].double() for name in module.layers]
    targets = [
        shifted_by_attributes(
            module.mapped["tokens"].keys @ w.mT,
            torch.stack([k @ w.mT for k in module.mapped["tokens"].guides]),
            module.alphas,
            module.mapped["tokens"].rows,
        )
        for w in pretrained
    ]
    updates = map_updates(pretrained, module.mapped["tokens"].keys, targets)
    for layer, weight, update in zip(module.layers.values(), pretrained, updates, strict=True):
        assert update.norm() > 1e-3 * weight.norm()
        assert_close(layer.weight.double(), weight + update, rtol=1e-6, atol=1e-6)  # float32


def test_the_run_ends_when_the_shares_are_near_enough(debias: Build, fit: Fit) -> None:
    module = debias(rounds=5, tolerance=1.0)
    trainer = fit(module, by_ridge_map())
    assert trainer.current_epoch == 1
    assert module.report["rounds"][-1]["alphas"] == [[0.0, 0.0], [0.0, 0.0]]
    assert module.pretrained.change_ratio() == 0


def test_pictures_are_drawn_of_the_phrases_from_seeds_of_their_own(debias: Build, fit: Fit) -> None:
    drawn: list[tuple[str, int]] = []

    class Watched(UCEDebias):
        def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            drawn.extend(zip(prompts, seeds, strict=True))
            return super().generate(prompts, seeds)

    template = debias(expand=True, phrases=["dog", "an owl"], rounds=1)
    module = Watched(**{**template.hparams, "judge": "emoji"})
    fit(module, by_ridge_map())
    assert len(drawn) == 2 * 2 * 6
    assert len({seed for _, seed in drawn}) == len(drawn)
    first = [prompt for prompt, _ in drawn[:12]]
    assert first[:2] == ["dog", "a picture of dog"]
    assert first == module.phrases  # six variants of each phrase, six pictures
    assert module.current_cost()["unet_forwards"] == 2 * len(drawn)  # guided


def test_a_share_does_not_depend_on_how_pictures_are_batched(debias: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    module = debias()
    module.configure_model()
    module.judge = module.load_judge()
    whole = module._answers(list(range(12)), 1)
    monkeypatch.setattr("lit_unlearn.methods.uce_debias.DRAW_BATCH", 5)
    parts = torch.cat([module._answers([0, 3], 1), module._answers([11], 1)])
    # What another process of two would have made of its share.
    assert torch.equal(parts, whole[[0, 3, 11]])
    assert whole.shape == (12, 3)
    assert not torch.equal(module._answers(list(range(12)), 2), whole)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_goes_on_where_it_stopped(debias: Build, fit: Fit, tmp_path: Path) -> None:
    whole = debias(rounds=3, step=0.7)
    fit(whole, by_ridge_map())

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / "kept", save_on_train_epoch_end=True)

    first = debias(rounds=1, step=0.7)
    fit(first, by_ridge_map(), keep())
    (path,) = (tmp_path / "kept").iterdir()
    resumed = debias(rounds=3, step=0.7)
    fit(resumed, by_ridge_map(), keep(), ckpt_path=path)
    assert resumed.report["rounds"] == whole.report["rounds"]
    assert len(resumed.report["rounds"]) == 4
    for ours, theirs in zip(resumed.layers.values(), whole.layers.values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_was_near_enough_when_it_was_cut_off_takes_no_more_rounds(
    debias: Build, fit: Fit, tmp_path: Path
) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", save_on_train_epoch_end=True)
    first = debias(rounds=5, tolerance=1.0)
    fit(first, by_ridge_map(), kept)
    (path,) = (tmp_path / "kept").iterdir()
    resumed = debias(rounds=5, tolerance=1.0)
    fit(resumed, by_ridge_map(), ckpt_path=path)
    assert resumed.report["rounds"] == first.report["rounds"]
    assert len(resumed.report["rounds"]) == 2  # the unedited model's, and one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ratios": [0.5, 0.6]},
            r"model.ratios=\[0.5, 0.6\] of 'dog' must be 2 shares that sum to 1, one for each of ",
        ),
        ({"ratios": {"owl": [0.5, 0.2]}}, "model.ratios=.* of 'owl' must be 2 shares"),
        ({"ratios": [0.2, 0.3, 0.5]}, "must be 2 shares that sum to 1"),
        ({"ratios": [1.5, -0.5]}, "must be 2 shares that sum to 1"),
        ({"ratios": {"cat": [0.5, 0.5]}}, "model.ratios has 'cat', but the edited concepts are dog, owl"),
        ({"attributes": ["cartoon", "oil"]}, "has no concept 'oil'"),
        ({"attributes": ["cartoon"]}, "name at least two concepts"),
        ({"attributes": ["cartoon", "cartoon"]}, "name at least two concepts of the set, each once"),
        ({"attributes": ["cartoon", "owl"]}, "model.attributes has 'owl', which is an edited concept as well"),
        ({"phrases": ["a dog"]}, "model.phrases has 1 phrases for 2 concepts"),
        ({"attribute_template": "{phrase}"}, "attribute_template='{phrase}' must contain {attribute}"),
        ({"rounds": 0}, "model.rounds=0 must be at least 1"),
        ({"images_per_phrase": 0}, "model.images_per_phrase=0 must be at least 1"),
        ({"step": 0.0}, "model.step=0.0 must be a positive number"),
        ({"tolerance": -0.1}, "model.tolerance=-0.1 must be a positive number"),
        ({"preserve": ["a wise owl"]}, "model.preserve has 'a wise owl', which names the edited concept 'owl'"),
    ],
)
def test_mistakes_are_found_before_a_weight_is_loaded(
    arguments: dict[str, Any], message: str, debias: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        debias(**arguments)


def test_cross_attention_of_a_transformer(debias: Build, tiny_pixart: Path, fit: Fit) -> None:
    module = debias(model=str(tiny_pixart), rounds=1)
    fit(module, by_ridge_map())
    assert len(module.report["rounds"]) == 2
    assert module.edited_names and all(".attn2.to_" in name for name in module.edited_names)
    assert not module.pretrained.unchanged()
