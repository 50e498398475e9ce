"""Every recipe of Concept Ablation edits each kind of pipeline in two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.training import cli as training
from lit_unlearn.training.recipes import find_recipe

NAMES = sorted(path.name for path in find_recipe("concept_ablation.yaml").parent.glob("concept_ablation*.yaml"))
QUIET = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary", "logger")]
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.callbacks=[]",
    "--data.init_args.steps=2",
    "--data.init_args.batch_size=2",
    "--model.init_args.images=2",
    "--model.init_args.anchor_inference_steps=1",
]


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "emoji-sd"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_two_steps(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = model if model == "emoji-sd" else str(request.getfixturevalue(model))
    recipe = find_recipe(name).resolve()
    monkeypatch.chdir(tmp_path)
    cli = training.run(["fit", "--config", str(recipe), f"--model.init_args.model={folder}", *SMALL, *QUIET])
    assert cli.trainer.global_step == 2
    assert isinstance(cli.model, ConceptAblation)
    assert cli.model.pretrained.change_ratio() > 0
    assert cli.model.report["anchors"]["made"] == 2
    assert list((tmp_path / "logs/anchors").glob("*/00000.safetensors"))


def test_there_is_a_recipe_for_each_loss() -> None:
    names = ("", "_noise", "_paper", "_diffusers")
    assert {f"concept_ablation{name}.yaml" for name in names} <= set(NAMES)


@pytest.mark.parametrize(("name", "prior", "clip"), [("paper", 0.2, None), ("diffusers", 0.25, 0.25)])
def test_the_presets_have_the_balance_and_the_clipping_of_their_codes(
    name: str, prior: float, clip: float | None
) -> None:
    """``test_concept_ablation.py`` has the losses of both codes beside ours: 1.0 there is 1/C here in one of them."""
    recipe = yaml.safe_load(find_recipe(f"concept_ablation_{name}.yaml").read_text(encoding="utf-8"))
    assert recipe["model"]["init_args"]["prior_weight"] == prior
    assert recipe["trainer"].get("gradient_clip_val") == clip
