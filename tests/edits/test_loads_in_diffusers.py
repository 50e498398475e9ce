"""diffusers loads every form of an export as docs/publishing.md says, and draws the edited pipeline's pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from helpers import KV, LAYERS, edit_content
from lit_unlearn import cli
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.lora_names import NAMINGS, STABLE_DIFFUSION, LoraNames, Naming

ATOL = 1e-5
"""Of pixels in [0, 1], whose edit moves them by a thousand times that: products in another order, and a cut at 1e-3."""
HALF = 5e-3
"""The same for half precision: five of a thousand steps from 0 to 1."""
RANK = 3
EDITS = {"text": LAYERS, "unet": KV, "both": [*LAYERS, *KV]}


@pytest.fixture(scope="session", params=EDITS)
def ckpt_path(request: pytest.FixtureRequest, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an edit of rank three."""
    return checkpoint(tiny_sd, EDITS[request.param], tmp_path_factory.mktemp(request.param) / "edit.ckpt")


def checkpoint(model: Path, names: list[str], path: Path) -> Path:
    """Write a checkpoint whose edit changes the weights ``names`` by matrices of rank three."""
    generator = torch.Generator().manual_seed(0)

    def edited(value: Tensor) -> Tensor:
        rows, columns = value.flatten(1).shape
        change = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
        return value + (change * value.norm() / change.norm()).reshape(value.shape)

    torch.save(edit_content(model, edited, names), path)
    return path


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    drawn = pipeline("a dog", num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="np")
    return torch.from_numpy(drawn.images)


@pytest.fixture
def pictures(ckpt_path: Path, tiny_sd: Path) -> tuple[Tensor, Tensor]:
    """What the base draws, and what it draws with the checkpoint's weights in the place of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    before = draw(pipeline)
    merge(pipeline, torch.load(ckpt_path, weights_only=True)["state_dict"])
    after = draw(pipeline)
    assert (after - before).abs().max() > 1e-2
    return before, after


@torch.no_grad()
def merge(pipeline: StableDiffusionPipeline, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        part, _, own = name.partition(".")
        getattr(pipeline, part).get_parameter(own).copy_(value)


Export = Callable[..., Path]


@pytest.fixture
def export(ckpt_path: Path, tmp_path: Path) -> Export:
    def run(*options: str) -> Path:
        assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", str(tmp_path / "out"), *options]) == 0
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("options", [(), ("--names", "2022"), ("--dtype", "float16")], ids=" ".join)
def test_a_folder(export: Export, pictures: tuple[Tensor, Tensor], options: tuple[str, ...]) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(export(*options), dtype=torch.float32)
    torch.testing.assert_close(draw(pipeline), pictures[1], rtol=0, atol=HALF if "float16" in options else ATOL)


def test_a_delta(export: Export, pictures: tuple[Tensor, Tensor], tiny_sd: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    merge(pipeline, load_file(export("--delta") / "delta.safetensors"))
    torch.testing.assert_close(draw(pipeline), pictures[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        ("auto",),
        (str(RANK + 4),),
        ("auto", "--dtype", "float16"),
        ("auto", "--lora_names", "kohya"),
        ("auto", "--lora_names", "diffusers"),
    ],
    ids=" ".join,
)
def test_lora_weights(export: Export, pictures: tuple[Tensor, Tensor], tiny_sd: Path, options: tuple[str, ...]) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(export("--lora", *options))
    before, after = pictures
    torch.testing.assert_close(draw(pipeline), after, rtol=0, atol=HALF if "float16" in options else ATOL)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), before, rtol=0, atol=ATOL)


@pytest.mark.parametrize("naming", NAMINGS)
def test_fused_lora_weights_are_the_edited_weights(
    export: Export, ckpt_path: Path, tiny_sd: Path, naming: Naming
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(export("--lora", "exact", "--lora_names", naming))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, value in torch.load(ckpt_path, weights_only=True)["state_dict"].items():
        part, _, own = name.partition(".")
        fused = getattr(pipeline, part).get_parameter(own)
        assert (fused - value).norm() < 1e-6 * value.norm(), name


def possible(components: StableDiffusion, names: LoraNames = STABLE_DIFFUSION) -> list[str]:
    return [name for name, value in components.named_parameters().items() if names.fits(name, value)]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("group", ["attn1", "attn2", "ff.net", "resnets", "proj_", "time_emb", "conv", "self_attn"])
def test_every_layer_that_lora_may_hold(
    components: StableDiffusion, tiny_sd: Path, tmp_path: Path, group: str, naming: Naming
) -> None:
    """diffusers' converter turns kohya's names into those of layers by patterns: each must come out as what it was."""
    found = possible(components, LoraNames.of(naming, ("unet", "text_encoder")))
    names = [name for name in found if group in name]
    path = checkpoint(tiny_sd, names, tmp_path / "edit.ckpt")
    options = ["--lora", "auto", "--lora_names", naming]
    assert cli.main(["export", "--ckpt_path", str(path), "-o", str(tmp_path / "out"), *options]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(tmp_path / "out")
    loaded = draw(pipeline)
    merged = StableDiffusionPipeline.from_pretrained(tiny_sd)
    before = draw(merged)
    merge(merged, torch.load(path, weights_only=True)["state_dict"])
    torch.testing.assert_close(loaded, draw(merged), rtol=0, atol=10 * ATOL)
    assert (loaded - before).abs().max() > 100 * ATOL


@pytest.mark.parametrize("layer", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("beside", [[], LAYERS[:1]], ids=["alone", "beside fc2"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_one_attention_layer_of_the_text_encoder(
    tiny_sd: Path, tmp_path: Path, layer: str, beside: list[str], naming: Naming
) -> None:
    names = [f"text_encoder.encoder.layers.1.self_attn.{layer}.weight", *beside]
    path = checkpoint(tiny_sd, names, tmp_path / "edit.ckpt")
    options = ["--lora", "auto", "--lora_names", naming]
    assert cli.main(["export", "--ckpt_path", str(path), "-o", str(tmp_path / "out"), *options]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(tmp_path / "out")
    merged = StableDiffusionPipeline.from_pretrained(tiny_sd)
    merge(merged, torch.load(path, weights_only=True)["state_dict"])
    torch.testing.assert_close(draw(pipeline), draw(merged), rtol=0, atol=ATOL)


def test_the_converter_of_kohyas_names_knows_every_layer(components: StableDiffusion) -> None:
    names = possible(components)
    assert len({STABLE_DIFFUSION.layer(name) for name in names}) == len(names)
    for name in names:
        state = {f"{STABLE_DIFFUSION.layer(name)}.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}
        found, _ = StableDiffusionPipeline.lora_state_dict(state)
        assert {key.partition(".")[0] for key in found} == {name.partition(".")[0]}


@pytest.mark.parametrize("options", [(), ("--delta",), ("--lora", "auto")], ids=" ".join)
def test_weights_too_large_for_a_type_are_not_written_as_infinite(
    options: tuple[str, ...], tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt_path = checkpoint(tiny_sd, KV[:1], tmp_path / "edit.ckpt")
    content = torch.load(ckpt_path, weights_only=True)
    content["state_dict"][KV[0]][0, 0] = 1e6
    torch.save(content, ckpt_path)
    output = tmp_path / "out"
    arguments = ["export", "--ckpt_path", str(ckpt_path), "-o", str(output), *options]
    assert cli.main([*arguments, "--dtype", "float16"]) == 2
    assert "dtype=float16 cannot hold " in capsys.readouterr().err
    assert not output.exists()
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0
