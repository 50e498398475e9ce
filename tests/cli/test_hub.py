"""A model of the hub that is not at hand: one look-up, one sentence, and no folder of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from lit_unlearn import cli

COMMANDS = {
    "fit": ["fit", "--config", "null_space.yaml", "--concept", "dog", "--model.init_args.model", "owner/name"],
    "generate": ["generate", "a dog", "--output", "a.png", "--model", "owner/name"],
}


@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_without_network(
    args: list[str], refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def look_up(self: HfApi, model: str, **options: Any) -> None:
        asked.append(model)
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(HfApi, "model_info", look_up)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refuses(*args)
    assert asked == ["owner/name"]
    for part in ("model='owner/name'", "model_index.json", "`hf download owner/name", "HF_HOME", "give a folder"):
        assert part in said
    assert not Path("logs").exists()


def test_a_weight_that_is_not_finite_is_said_and_leaves_no_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], tiny_sd: Path, pets: str
) -> None:
    shutil.copytree(tiny_sd, "model")
    file = Path("model/unet/diffusion_pytorch_model.safetensors")
    save_file({**load_file(file), "conv_in.bias": torch.full((16,), torch.nan)}, file, metadata={"format": "pt"})
    args = ["fit", "--config", "null_space.yaml", "--concept", "dog", "--model.init_args.model", "model"]
    assert cli.main([*args, "--model.init_args.concept_set", pets, "--trainer.accelerator", "cpu"]) == 2
    assert "model/unet has the weight 'conv_in.bias', which is not finite" in capsys.readouterr().err
    assert not list(Path("logs").glob("**/run.json"))
