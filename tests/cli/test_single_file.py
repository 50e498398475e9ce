"""``export --format single``: diffusers loads the copy and draws what the edited pipeline draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import KV, LAYERS, header_of, metadata
from lit_unlearn import cli
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.edits.single_file import SingleFile
from lit_unlearn.methods.shared.editor import CHECKPOINT_KEY

NAMES = [*LAYERS, *KV, "text_encoder.encoder.layers.0.self_attn.v_proj.weight"]
ENCODERS = {
    "tiny_sd": ("cond_stage_model.transformer.", names.clip),
    "tiny_sd2": ("cond_stage_model.model.", names.open_clip),
}


def checkpoint(model: Path, path: Path, edited: list[str] = NAMES) -> str:
    """Write a checkpoint whose edit changes the weights ``edited``."""
    parameters = load_pipeline(str(model)).named_parameters()
    base = {name: parameters[name].detach().clone() for name in edited}
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: value + torch.randn(value.shape, generator=generator) * value.std() for name, value in base.items()
    }
    ours = {
        "method": "ValueRefinement",
        "concepts": ["dog"],
        "model": str(model),
        "edited_names": edited,
        "base_fingerprint": fingerprint(base),
    }
    torch.save({"state_dict": changed, "hyper_parameters": {"dtype": "float32"}, CHECKPOINT_KEY: ours}, path)
    return str(path)


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline("a dog", num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="np")
    return torch.from_numpy(drawn.images)


def load_single(file: Path, config: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, safety_checker=None
    )


@pytest.mark.parametrize("model", ["tiny_sd", pytest.param("tiny_sd2", marks=pytest.mark.slow)])
def test_diffusers_loads_the_copy_and_draws_the_edit(
    model: str, request: pytest.FixtureRequest, single_file: Callable[..., Path], tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    source = single_file(folder, tmp_path / "model.safetensors", encoder=ENCODERS[model])
    ckpt_path, output = checkpoint(folder, tmp_path / "edit.ckpt"), tmp_path / "out.safetensors"
    arguments = ["export", "--ckpt_path", ckpt_path, "--format", "single", "--single_file", str(source)]
    assert cli.main([*arguments, "-o", str(output)]) == 0
    before = draw(load_single(source, folder))
    torch.testing.assert_close(before, draw(StableDiffusionPipeline.from_pretrained(folder)), rtol=0, atol=0)
    assert cli.main(["export", "--ckpt_path", ckpt_path, "-o", str(tmp_path / "edited")]) == 0
    after = draw(StableDiffusionPipeline.from_pretrained(tmp_path / "edited"))
    torch.testing.assert_close(draw(load_single(output, folder)), after, rtol=0, atol=0)
    assert (after - before).abs().max() > 1e-2

    facts = {key: value for key, value in metadata(str(output)).items() if key.startswith("lit_unlearn.")}
    assert json.loads(facts["lit_unlearn.concepts"]) == ["dog"]
    assert json.loads(facts["lit_unlearn.edited_weights"]) == NAMES
    assert str(tmp_path) not in "".join(facts.values())
    assert cli.main(["verify", str(output), "--base", str(folder)]) == 0
    assert cli.main([*arguments, "-o", str(output)]) == 2
    assert cli.main([*arguments, "-o", str(output), "--overwrite"]) == 0


def test_verify_finds_what_has_changed(
    tiny_sd: Path, single_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = single_file(tiny_sd, tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    ckpt_path = checkpoint(tiny_sd, tmp_path / "edit.ckpt", LAYERS)
    command = ["export", "--ckpt_path", ckpt_path, "--format", "single", "--single_file", str(source)]
    assert cli.main([*command, "-o", str(output)]) == 0
    file = SingleFile(output)
    for name, row in ((LAYERS[0], "edited weights"), (KV[0], "unedited weights")):
        tensors = load_file(output)
        tensors[file.place(name).key] += 1
        save_file(tensors, tmp_path / "changed.safetensors", metadata(str(output)))
        capsys.readouterr()
        assert cli.main(["verify", str(tmp_path / "changed.safetensors"), "--base", str(tiny_sd)]) == 1
        found = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(row))
        assert name[:40] in found  # the table cuts it


def test_half_precision_is_said(
    tiny_sd: Path, single_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = single_file(tiny_sd, tmp_path / "fp16.safetensors", torch.float16), tmp_path / "out.safetensors"
    ckpt_path = checkpoint(tiny_sd, tmp_path / "edit.ckpt", LAYERS)
    command = ["export", "--ckpt_path", ckpt_path, "--format", "single", "--single_file", str(source)]
    assert cli.main([*command, "-o", str(output)]) == 0
    assert "2 of the edited weights are rounded to float16, which the file has them in" in capsys.readouterr().out
    assert {entry["dtype"] for entry in SingleFile(output).header.values()} == {"F16"}
    assert cli.main(["verify", str(output), "--base", str(tiny_sd)]) == 0
    assert len(header_of(output)[1]) == len(header_of(source)[1])


@pytest.mark.slow
def test_a_file_of_another_model_is_refused(
    tiny_sd: Path, tiny_sd2: Path, single_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = single_file(tiny_sd2, tmp_path / "other.safetensors")
    ckpt_path = checkpoint(tiny_sd, tmp_path / "edit.ckpt", LAYERS)
    command = ["export", "--ckpt_path", ckpt_path, "--format", "single", "--single_file", str(source)]
    assert cli.main([*command, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "differs from model=" in (error := capsys.readouterr().err)
    assert " in text_encoder and unet and vae (text_encoder." in error
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_without_the_encoder_is_refused_before_the_model_is_read(
    tiny_sd: Path, single_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = single_file(tiny_sd, tmp_path / "unet.safetensors", encoder=None)
    ckpt_path = checkpoint(tiny_sd, tmp_path / "edit.ckpt", LAYERS)
    command = [
        "export",
        "--ckpt_path",
        ckpt_path,
        "--format",
        "single",
        "--single_file",
        str(source),
        "--model",
        "none",
    ]
    assert cli.main([*command, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "holds no text_encoder (no cond_stage_model.*" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "single"], "--format single and --single_file FILE belong together"),
        (["--single_file", "a.safetensors"], "--format single and --single_file FILE belong together"),
        (["--format", "single", "--single_file", "none.safetensors"], "single_file=none.safetensors does not exist"),
        (["--format", "single", "--single_file", "a.safetensors", "--delta"], "cannot be combined with --delta"),
        (["--format", "single", "--single_file", "a.safetensors", "--lora", "4"], "cannot be combined with --lora"),
        (
            ["--format", "single", "--single_file", "a.safetensors", "--names", "2022"],
            "cannot be combined with --names",
        ),
        (["--format", "single", "--single_file", "a.safetensors", "--dtype", "float16"], "the types of the file"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--ckpt_path", "none.ckpt", "-o", "out.safetensors", *options]) == 2
    assert message in capsys.readouterr().err
