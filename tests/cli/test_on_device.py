"""Each command says where it runs, and in one sentence that memory ran out and what takes less."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from helpers import files
from lit_unlearn import cli
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.value_refinement import ValueRefinement


def full(*args: Any, **kwargs: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_a_run_says_where_it_runs(recipe: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", str(recipe)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "fit on the processor"


def test_a_fit_that_runs_out_of_memory(
    recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ValueRefinement, "training_step", full)
    assert cli.main(["fit", "--config", str(recipe), "--data.batch_size", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lit-unlearn: error: fit: the processor ran out of memory; lower --data.batch_size (now 2), or load the model "
        "in half of the precision (--model.dtype bfloat16)."
    )
    monkeypatch.undo()  # what is advised can be given as it stands
    monkeypatch.chdir(workplace)
    advice = ["--data.batch_size", "1", "--model.dtype", "bfloat16", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "--config", str(recipe), *advice]) == 0


def test_a_test_that_runs_out_of_memory(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run_folder)
    test = ["test", "--config", str(run_folder / "config.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(ConceptEditor, "generate", full)
        assert cli.main(test) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lit-unlearn: error: test: the processor ran out of memory; lower --data.eval_batch_size (now 40)."
    )
    assert not {"scores.json", "grid.png"} & (files(run_folder) - before)
    assert cli.main([*test, "--data.eval_batch_size", "1"]) == 0


def test_drawing_that_runs_out_of_memory(
    tiny_sd: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = ["generate", "a dog", "--model", str(tiny_sd), "-o", "dog.png", "--num_inference_steps", "1", "--num", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "draw", full)
        assert cli.main([*draw, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lit-unlearn: error: generate: the processor ran out of memory; draw fewer at once (--batch_size, now 8)."
    )
    assert files(workplace) == set()
    sizes = []
    decode = StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda *own: sizes.append(len(own[-1])) or decode(*own))
    assert cli.main([*draw, "--batch_size", "2"]) == 0
    assert sizes == [2, 1]
