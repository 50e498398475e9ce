"""The recipes of UCE from the command line: on small models of both forms, on the embedded one, and with mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import QUIET
from lit_unlearn import cli
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

RECIPES = ["uce.yaml", "uce_2023.yaml", "uce_2025.yaml", "uce_moderate.yaml", "uce_debias.yaml"]
ONLY_THE_EDIT = ["--trainer.callbacks", "[]"]
SHORT = [
    f"--model.init_args.{key}" for key in ("rounds=1", "images_per_phrase=2", "tolerance=0.01", "num_inference_steps=2")
]


def fitted(recipe: str, model: str) -> dict[str, Any]:
    """Fit ``recipe`` on ``model`` and return the checkpoint."""
    short = SHORT if recipe == "uce_debias.yaml" else []
    args = ["--config", recipe, "--model.init_args.model", model, "--concept", "[dog, soccer ball]"]
    assert cli.main(["fit", *args, *QUIET, *ONLY_THE_EDIT, *short]) == 0
    (path,) = Path("logs").rglob("last.ckpt")
    return torch.load(path, weights_only=True)


def check(checkpoint: dict[str, Any], model: str) -> None:
    report = checkpoint[CHECKPOINT_KEY]["report"]
    before = load_pipeline(model).named_parameters()
    assert set(checkpoint["state_dict"]) == {
        name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    for name, weight in checkpoint["state_dict"].items():
        assert weight.isfinite().all()
        assert not torch.equal(weight, before[name]), name
    assert 1e-3 < report["weight_change_ratio"] < 100
    assert all(layer["residual"] < layer["residual_before"] for layer in report["layers"].values())
    if "rounds" in report:
        assert len(report["rounds"]) == 2
        assert all(sum(shares) == pytest.approx(1.0) for found in report["rounds"] for shares in found["ratios"])


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_on_both_forms_of_stable_diffusion(
    recipe: str, model: str, workplace: Path, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(model))
    check(fitted(recipe, path), path)


@pytest.mark.parametrize(
    "recipe", [r if r in ("uce.yaml", "uce_debias.yaml") else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES]
)
def test_a_recipe_fits_on_the_embedded_model(recipe: str, workplace: Path) -> None:
    check(fitted(recipe, "emoji-sd"), "emoji-sd")


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (
            "uce.yaml",
            ["preserve=[a cat, a friendly dog]"],
            "model.preserve has 'a friendly dog', which names the edited",
        ),
        ("uce.yaml", ["edited_parameters=text-fc2"], "edited_parameters='text-fc2' selects text_encoder."),
        ("uce.yaml", ["edited_parameters=xattn-q"], "edited_parameters='xattn-q' selects no parameter"),
        ("uce.yaml", ["edit.erase_scale=-1"], "edit.erase_scale=-1.0 must be a positive number"),
        ("uce.yaml", ["edit.preserve_scale=-1"], "edit.preserve_scale=-1.0 must be zero or larger"),
        ("uce.yaml", ["edit.lamb=-1"], "edit.lamb=-1.0 must be a positive number"),
        ("uce.yaml", ["lamb=1"], "model: UCE has no option 'lamb'"),
        (
            "uce.yaml",
            ["towards=prompt", "guide=a small dog"],
            "model.guide='a small dog' names the edited concept 'dog'",
        ),
        ("uce.yaml", ["tokens=first"], "model.tokens: one of ['last_subject', 'from_subject', 'all'] expected"),
        ("uce_debias.yaml", ["ratios=[0.5, 0.5, 0.5, 0.5]"], "must be 4 shares that sum to 1"),
        ("uce_debias.yaml", ["attributes=[cartoon, oil]"], "has no concept 'oil'"),
    ],
)
def test_mistakes_are_one_sentence(recipe: str, options: list[str], message: str, refuses: Callable[..., str]) -> None:
    given = [f"--{option}" if option.startswith("edit.") else f"--model.init_args.{option}" for option in options]
    said = refuses("fit", "--config", recipe, "--concept", "dog", *given)
    assert message in said, said
