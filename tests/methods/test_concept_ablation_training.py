"""What ``ConceptAblation`` refuses, its learning rate, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import Interrupted, changed, interrupt, weights
from lit_unlearn.methods.concept_ablation import ConceptAblation

Ablation = Callable[..., ConceptAblation]
Fit = Callable[..., L.Trainer]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"images": 0}, r"model\.images=0 must be at least 1"),
        ({"anchor_inference_steps": 0}, r"model\.anchor_inference_steps=0 must be at least 1"),
        ({"anchor_batch_size": -1}, r"model\.anchor_batch_size=-1 must be at least 1"),
        ({"prior_weight": -0.1}, r"model\.prior_weight=-0\.1 must not be negative"),
        ({"edited_parameters": "attn9"}, "edited_parameters='attn9' selects no parameter"),
        ({"edited_parameters": "decoder"}, "edited_parameters='decoder' selects vae.* does not affect any prediction"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    arguments: dict[str, Any], problem: str, ablation: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        ablation(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("anchor", "a dog", "concept 'dog', field 'anchor': 'a dog' names the concept"),
        ("target", "Dog", "concept 'dog', field 'target': 'Dog' is the concept itself"),
        ("target_prompts", ["a cat", "the dog in the rain"], "field 'target_prompts': 'the dog in the rain' names the"),
        ("edit_prompts", ["a soccer ball", "a dog"], "'a soccer ball' equals its edit prompt"),
    ],
)
def test_an_anchor_that_is_the_concept_is_refused(
    field: str, value: Any, problem: str, pets: str, ablation: Ablation, tmp_path: Path
) -> None:
    content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
    content["concepts"]["dog"][field] = value
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        ablation(concept_set=str(path))


@pytest.mark.parametrize(
    ("concepts", "circle"),
    [
        (["dog", "cat"], "dog, cat"),
        (["apple", "sunset", "glossy", "rain", "walking"], "sunset, rain"),
        (["glossy", "cartoon", "sketch"], "glossy, cartoon, sketch"),  # the sketch leads to glossy
        (["surfing", "walking"], None),  # to walking, to standing
        (["dog", "owl", "sunset"], None),  # though a prompt of an anchor is "a cat at sunset"
    ],
)
def test_concepts_that_are_each_others_anchors_need_a_frozen_reference(
    concepts: list[str], circle: str | None, ablation: Ablation
) -> None:
    if circle:
        with pytest.raises(ValueError, match=f"reference=live has no fixed target for {circle}.*to frozen"):
            ablation(concept_set="emoji20", concept=concepts, repair_pairs=False)
    else:
        ablation(concept_set="emoji20", concept=concepts, repair_pairs=False)
    ablation(concept_set="emoji20", concept=concepts)  # whose repaired anchors are not edited
    ablation(concept_set="emoji20", concept=concepts, reference="frozen")
    ablation(concept_set="emoji20", concept=concepts, objective="noise")


def test_an_embedding_without_own_words_is_refused(ablation: Ablation) -> None:
    module = ablation(edited_parameters="embedding")
    module.pairs[0].append(("a dog", "a toy dog"))
    with pytest.raises(ValueError, match="'embedding' leaves no row to train, since the anchor of 'dog' has"):
        module.configure_model()


def test_the_learning_rate_is_scaled_only_if_asked(ablation: Ablation, fit: Fit) -> None:
    plain, scaled = ablation(), ablation(scale_lr=True)
    assert fit(plain, batch_size=6).optimizers[0].param_groups[0]["lr"] == plain.report["learning_rate"] == 1e-2
    trainer = fit(scaled, batch_size=6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == scaled.report["learning_rate"] == pytest.approx(6e-2)
    trainer.accumulate_grad_batches = 2
    assert scaled.make_optimizer().param_groups[0]["lr"] == pytest.approx(12e-2)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("group", ["xattn-kv", "embedding"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    group: str, ablation: Ablation, fit: Fit, tmp_path: Path
) -> None:
    whole, first, resumed = (ablation(edited_parameters=group, prior_weight=0.2) for _ in range(3))
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=1)
    with pytest.raises(Interrupted):
        fit(first, interrupt("on_train_batch_end", step=3), keep(), steps=5, batch_size=2)
    last = tmp_path / "saved/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    fit(whole, steps=5, batch_size=2)
    fit(resumed, keep(), steps=5, batch_size=2, ckpt_path=last)
    assert changed(weights(whole), weights(resumed)) == []
    assert changed(weights(first), weights(resumed)) == resumed.edited_names
    # The first run made and kept them for all three, and its cost is part of the resumed one's.
    assert whole.report["anchors"] == {"pictures": 4, "made": 0}
    assert resumed.report["anchors"] == first.report["anchors"] == {"pictures": 4, "made": 4}
