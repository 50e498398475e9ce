"""LoRA weights of newer families: what diffusers has loaded and fused are the edited weights, in every part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_unlearn import cli
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.lora_names import NAMINGS, LoraNames, Naming
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.edits.lora import FILE_NAME
from lit_unlearn.methods.shared.editor import CHECKPOINT_KEY

FIRST = r"text_encoder\..*mlp\.fc2\.weight"
SECOND = r"text_encoder_2\..*mlp\.fc2\.weight"
KV = r"unet\..*attn2\.to_[kv]\.weight"
EDITS = {
    "first encoder": FIRST,
    "second encoder": SECOND,
    "both encoders": f"{FIRST}|{SECOND}",
    "attention of the second": r"text_encoder_2\..*layers\.[12]\.self_attn\.[kv]_proj\.weight",
    "every part": f"{FIRST}|{SECOND}|{KV}",
}


def checkpoint(model: Path, pattern: str, path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose edit changes the weights that match by matrices of rank two; and their new values."""
    parameters = load_pipeline(str(model)).named_parameters()
    base = {name: value.detach().clone() for name, value in parameters.items() if re.fullmatch(pattern, name)}
    generator = torch.Generator().manual_seed(0)
    edited = {}
    for name, value in base.items():
        rows, columns = value.flatten(1).shape
        change = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        edited[name] = value + (change * value.norm() / change.norm()).reshape(value.shape)
    ours = {
        "method": "ValueRefinement",
        "concepts": ["dog"],
        "model": str(model),
        "edited_names": list(base),
        "base_fingerprint": fingerprint(base),
    }
    torch.save({"state_dict": edited, "hyper_parameters": {"dtype": "float32"}, CHECKPOINT_KEY: ours}, path)
    return path, edited


def export(model: Path, pattern: str, folder: Path, naming: str) -> tuple[Path, dict[str, Tensor]]:
    """LoRA weights of such an edit, and its values."""
    path, edited = checkpoint(model, pattern, folder / "edit.ckpt")
    options = ["--lora", "auto", "--lora_names", naming]
    assert cli.main(["export", "--ckpt_path", str(path), "-o", str(folder / "out"), *options]) == 0
    return folder / "out", edited


def parameter(pipeline: Any, name: str) -> nn.Parameter:
    part, _, own = name.partition(".")
    found: nn.Parameter = getattr(pipeline, part).get_parameter(own)
    return found


def check_fused(pipeline: Any, edited: Mapping[str, Tensor]) -> None:
    """Fuse what ``pipeline`` has loaded; its weights are then the edited ones, to rounding, and no others differ."""
    pipeline.fuse_lora([part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None])
    pipeline.unload_lora_weights()
    for name, value in edited.items():
        assert (parameter(pipeline, name) - value).norm() < 1e-6 * value.norm(), name


def draw(pipeline: StableDiffusionXLPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline("a dog", num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="np")
    return torch.from_numpy(drawn.images)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("edit", EDITS)
def test_stable_diffusion_xl(tiny_sdxl: Path, tmp_path: Path, edit: str, naming: Naming) -> None:
    folder, edited = export(tiny_sdxl, EDITS[edit], tmp_path, naming)
    merged = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    before = draw(merged)
    with torch.no_grad():
        for name, value in edited.items():
            parameter(merged, name).copy_(value)
    after = draw(merged)
    assert (after - before).abs().max() > 1e-2
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(folder / FILE_NAME)
    torch.testing.assert_close(draw(pipeline), after, rtol=0, atol=1e-4)
    check_fused(pipeline, edited)
    torch.testing.assert_close(draw(pipeline), after, rtol=0, atol=1e-4)
    others = dict(load_pipeline(str(tiny_sdxl)).named_parameters())
    for name in others.keys() - edited.keys():
        assert torch.equal(parameter(pipeline, name), others[name]), name


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_of_stable_diffusion_xl(tiny_sdxl: Path, tmp_path: Path, naming: Naming) -> None:
    names = LoraNames.of(naming, ("unet", "text_encoder", "text_encoder_2"))
    parameters = load_pipeline(str(tiny_sdxl)).named_parameters()
    fitting = [name for name, value in parameters.items() if names.fits(name, value)]
    assert any("add_embedding" in name for name in fitting) == (naming == "diffusers")
    folder, edited = export(tiny_sdxl, "|".join(re.escape(name) for name in fitting), tmp_path, naming)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(folder)
    check_fused(pipeline, edited)


def test_kohya_numbers_the_text_encoders(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder, _ = export(tiny_sdxl, EDITS["every part"], tmp_path, "kohya")
    assert {name.partition("_text_")[0].partition("_blocks_")[0] for name in load_file(folder / FILE_NAME)} == {
        *("lora_te1", "lora_te2", "lora_unet_down", "lora_unet_up"),
        "lora_unet_mid_block_attentions_0_transformer",
    }


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux"])
def test_transformers_are_read_by_diffusers_own_names(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    base: Path = request.getfixturevalue(model)
    clip = r"text_encoder(_2)?\..*\.fc2\.weight"
    folder, edited = export(
        base, rf"transformer\.(context_embedder|.*add_k_proj)\.weight|{clip}", tmp_path, "diffusers"
    )
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder)
    check_fused(pipeline, edited)
    arguments = ["export", "--ckpt_path", str(tmp_path / "edit.ckpt"), "-o", str(tmp_path / "kohya"), "--lora", "auto"]
    assert cli.main(arguments) == 2
    assert "which diffusers does not read by kohya's names: pass --lora_names diffusers" in capsys.readouterr().err
    assert not (tmp_path / "kohya").exists()


@pytest.mark.parametrize("naming", NAMINGS)
def test_pixart_is_exported_in_the_forms_that_diffusers_reads(
    naming: Naming, tiny_pixart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = r"transformer\.caption_projection\.linear_1\.weight|text_encoder\..*\.wo\.weight"
    path, edited = checkpoint(tiny_pixart, pattern, tmp_path / "edit.ckpt")
    assert len(edited) == 3
    arguments = ["export", "--ckpt_path", str(path), "-o"]
    for options, message in (
        (["--lora", "auto", "--lora_names", naming], "lora: diffusers reads no LoRA weights for PixArt-Alpha"),
        (["--format", "single"], "is no single file"),
    ):
        assert cli.main([*arguments, str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, str(tmp_path / "folder")]) == 0
    whole = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert cli.main([*arguments, str(tmp_path / "delta.safetensors"), "--delta"]) == 0
    assert load_file(tmp_path / "delta.safetensors").keys() == edited.keys()
    for name, value in load_pipeline(str(tiny_pixart)).named_parameters().items():
        assert torch.equal(parameter(whole, name), edited.get(name, value)), name
