"""Models of which only the configurations are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.described import ARCHITECTURES, DescribedModel
from lit_unlearn.diffusion.families import FAMILIES, StableDiffusion
from lit_unlearn.diffusion.single_file.architectures import architectures


def test_a_folder_needs_no_weights(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    found, whole = DescribedModel.find(str(folder)), BaseModel.find(str(tiny_sd))
    assert sorted(found.names) == sorted(whole.names)
    assert found.family is StableDiffusion and found.architecture is None
    pipeline = found.pipeline(torch.bfloat16)
    assert {weight.device.type for weight in pipeline.named_parameters().values()} == {"meta"}
    assert {weight.dtype for weight in pipeline.named_parameters().values()} == {torch.bfloat16}
    assert pipeline.latent_shape == whole.load().latent_shape


def test_an_architecture_by_its_name_or_a_model_of_the_hub() -> None:
    found = DescribedModel.find("CompVis/stable-diffusion-v1-4")
    assert (found.name, found.architecture) == ("CompVis/stable-diffusion-v1-4", "sd1")
    counts = {
        name: sum(value.numel() for value in part.parameters()) for name, part in found.parts(torch.float32).items()
    }
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}  # the known sizes
    assert set(ARCHITECTURES.values()) <= set(architectures())


@pytest.mark.parametrize(
    ("model", "architecture", "transformer"),
    [
        ("PixArt-alpha/PixArt-XL-2-1024-MS", "pixart_alpha", 611_349_152),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart_sigma", 610_856_096),  # the published size, 603 tensors
    ],
)
def test_pixart_by_a_model_of_the_hub(model: str, architecture: str, transformer: int) -> None:
    found = DescribedModel.find(model)
    assert found.architecture == architecture and found.family is FAMILIES[f"PixArt{architecture[7:].title()}Pipeline"]
    pipeline = found.pipeline(torch.bfloat16)
    counts = {name: sum(value.numel() for value in part.parameters()) for name, part in pipeline.parts.items()}
    assert counts == {"text_encoder": 4_762_310_656, "transformer": transformer, "vae": 83_653_863}
    told = architecture == "pixart_alpha"
    assert len(list(pipeline.denoiser.parameters())) == 603 + 8 * told
    assert pipeline.texts[0].length == (120 if told else 300) and pipeline.picture_size == (1024, 1024)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("someone/unknown", "is not downloaded, and its architecture is not known: give a folder"),
        ("no/such/one", "no hub"),
    ],
)
def test_what_is_not_known(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DescribedModel.find(model)
