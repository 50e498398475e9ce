"""``export --format single``: diffusers loads the copy and draws what the edited pipeline draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_families import as_single_file, build_flux
from torch import Tensor

from helpers import KV, LAYERS, QUIET, header_of, metadata
from lit_unlearn import cli
from lit_unlearn.commands.generate import earlier_edit
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.diffusion.single_file.file import SingleFile
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

NAMES = [*LAYERS, *KV, "text_encoder.encoder.layers.0.self_attn.v_proj.weight"]
ENCODERS = {
    "tiny_sd": ("cond_stage_model.transformer.", names.clip),
    "tiny_sd2": ("cond_stage_model.model.", names.open_clip),
}


def checkpoint(model: Path, path: Path, edited: Sequence[str] = NAMES, config_folder: Path | None = None) -> str:
    """Write a checkpoint whose edit changes the weights ``edited``."""
    given = None if config_folder is None else str(config_folder)
    base = BaseModel.find(str(model), config_folder=given).weights(edited, torch.float32)
    assert base is not None
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: value + torch.randn(value.shape, generator=generator) * value.std() for name, value in base.items()
    }
    ours = {
        "method": "ValueRefinement",
        "concepts": ["dog"],
        "model": str(model),
        "edited_names": list(edited),
        "base_fingerprint": fingerprint(base),
    }
    options = {"dtype": "float32", "config_folder": given}
    torch.save({"state_dict": changed, "hyper_parameters": options, CHECKPOINT_KEY: ours}, path)
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
    assert (earlier_edit(output), earlier_edit(source)) == (["dog"], [])  # what ``generate --model`` says of them
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
        (["--single_file", "a.safetensors"], "--single_file FILE needs --format single"),
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
def test_options_that_do_not_fit(
    workplace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.ckpt").touch()
    assert cli.main(["export", "--ckpt_path", "empty.ckpt", "-o", "out.safetensors", *options]) == 2
    assert message in capsys.readouterr().err


FLUX = pytest.param("tiny_flux", marks=pytest.mark.slow)
EDITED = {
    "tiny_sdxl": [
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight",
        "unet.add_embedding.linear_1.weight",
        "text_encoder.encoder.layers.1.mlp.fc2.weight",
        "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj.weight",
        "text_encoder_2.text_projection.weight",
    ],
    "tiny_sd3": [
        "transformer.context_embedder.weight",
        "transformer.transformer_blocks.0.attn.add_v_proj.bias",
        "transformer.time_text_embed.text_embedder.linear_1.weight",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2.weight",
        "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo.weight",
    ],
    "tiny_flux": [
        "transformer.context_embedder.weight",
        "transformer.transformer_blocks.0.attn.add_k_proj.weight",
        "transformer.single_transformer_blocks.1.attn.to_v.weight",
        "text_encoder.encoder.layers.2.mlp.fc2.weight",
        "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wo.weight",
    ],
}


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("models") / "tiny-flux", True)


@pytest.mark.parametrize("model", [pytest.param("tiny_sdxl", marks=pytest.mark.slow), "tiny_sd3", FLUX])
def test_every_family_goes_in_and_out_as_a_file(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, edited = request.getfixturevalue(model), EDITED[model]
    source = as_single_file(folder, tmp_path / "model.safetensors", metadata={"modelspec.hash_sha256": "0x" + "1" * 64})
    ckpt_path, output = checkpoint(source, tmp_path / "edit.ckpt", edited, folder), tmp_path / "out.safetensors"
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--format", "single", "-o", str(output)]) == 0
    file, values = SingleFile(output), torch.load(ckpt_path, weights_only=True)["state_dict"]
    (before, old), (after, new) = header_of(source), header_of(output)
    before.pop("__metadata__")
    facts = after.pop("__metadata__")
    assert before == after
    assert str(tmp_path) not in str(facts)
    rows = 0
    for name in edited:
        assert torch.equal(file.read(name), values[name])
        rows += values[name].numel() * 4
    changed = {number for number in range(len(old)) if old[number] != new[number]}
    keys = {file.place(name).key for name in edited}
    assert len(changed) <= rows  # of a fused tensor only its rows
    for key, entry in file.header.items():
        assert (not changed.isdisjoint(range(*entry["data_offsets"]))) == (key in keys), key
    base = ["--base", str(source), "--config_folder", str(folder)]
    assert cli.main(["verify", str(output), *base]) == 0
    found = BaseModel.find(str(output), config_folder=str(folder)).weights(edited, torch.float32)
    assert found is not None and all(torch.equal(found[name], values[name]) for name in edited)
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--delta", "-o", str(tmp_path / "delta.safetensors")]) == 0
    again = ["export", "--ckpt_path", str(tmp_path / "delta.safetensors"), "--format", "single"]
    assert cli.main([*again, "-o", str(tmp_path / "again.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "edits a model in a file called 'model.safetensors' and does not say where that lies" in error
    given = ["--model", str(source), "--config_folder", str(folder)]
    assert cli.main([*again, *given, "-o", str(tmp_path / "again.safetensors")]) == 0
    assert header_of(tmp_path / "again.safetensors")[1] == new


def test_an_encoder_in_the_folder_is_not_written_into_a_denoiser_alone(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = as_single_file(tiny_sd3, tmp_path / "model.safetensors", parts=["transformer"], prefix="")
    ckpt_path = checkpoint(source, tmp_path / "edit.ckpt", EDITED["tiny_sd3"][-1:], tiny_sd3)
    command = ["export", "--ckpt_path", ckpt_path, "--format", "single", "-o", str(tmp_path / "out.safetensors")]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert (
        "holds the transformer alone, no text_encoder_3 (no text_encoders.t5xxl.*), and the edit changes text_" in error
    )
    assert "export a folder or a delta" in error


def test_a_folder_has_no_file_to_copy(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt_path = checkpoint(tiny_sd, tmp_path / "edit.ckpt", LAYERS)
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--format", "single", "-o", str(tmp_path / "out")]) == 2
    assert "--format single needs --single_file FILE: model='" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fit_of_a_file_edits_it(tiny_sd: Path, pets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    base = ["--model", source.name, "--config_folder", str(tiny_sd)]
    recipe = ["--config", "uce.yaml", "--concept", "dog", "--model.concept_set", pets, *QUIET]
    for place in (base, ["--model", str(tiny_sd)]):
        assert cli.main(["fit", *recipe, *place]) == 0
    runs = [read_edit(path) for path in sorted(Path("logs").rglob("last.ckpt"))]
    assert runs[0].weights and list(runs[0].weights) == list(runs[1].weights)
    assert all(torch.equal(value, runs[1].weights[name]) for name, value in runs[0].weights.items())
    command = ["export", "--ckpt_path", str(runs[0].path), "--format", "single", "-o", "out.safetensors"]
    assert cli.main(command) == 0
    facts = metadata("out.safetensors")
    assert str(tiny_sd) not in str(facts)
    assert json.loads(facts["lit_unlearn.base_model"]).startswith("model.safetensors@")
