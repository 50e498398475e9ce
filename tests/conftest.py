"""Random-weight pipelines in the layout of Stable Diffusion, small enough to build, train and sample in a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lit_unlearn.diffusion.components import DiffusionComponents, load_components
from lit_unlearn.emoji.text_encoder import MAX_LENGTH, train_tokenizer

NOT_OURS = (
    # NumPy's of what diffusers' schedulers do with tensors
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # Lightning's, where we mean it: the pipeline stays in evaluation mode while it is edited
    "ignore:Found .* module.s. in eval mode at the start of training",
)
"""Warnings of the libraries that do not fail a test."""

NUM_TEXT_LAYERS = 3
HIDDEN, INTERMEDIATE = 32, 128


def pytest_configure(config: pytest.Config) -> None:
    for line in NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


def build_pipeline(output: Path, hidden_act: str, prediction_type: str, pad_token: str | None = None) -> Path:
    """Write a pipeline with random weights, always the same ones, into ``output``: latents of 8, pictures of 16 pixels."""
    tokenizer = train_tokenizer()
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=NUM_TEXT_LAYERS,
                num_attention_heads=2,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=HIDDEN,
                hidden_act=hidden_act,
                initializer_factor=5.0,  # prompts must differ in the states by more than rounding
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=HIDDEN,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output)
    return output


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion 1.x; not to be written to."""
    return build_pipeline(tmp_path_factory.mktemp("models") / "tiny-sd", "quick_gelu", "epsilon")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion 2.x: velocity prediction, prompts padded with "!" instead of EOS."""
    return build_pipeline(tmp_path_factory.mktemp("models") / "tiny-sd2", "gelu", "v_prediction", pad_token="!")


@pytest.fixture(scope="session")
def tiny_sd_2022(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_sd`` with its text encoder's weights named as in 2022: a prefix, and position ids among the weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd-2022"
    shutil.copytree(tiny_sd, folder)
    file = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(MAX_LENGTH).unsqueeze(0)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def components(tiny_sd: Path) -> DiffusionComponents:
    """The parts of ``tiny_sd``, loaded anew for each test."""
    return load_components(str(tiny_sd))


@pytest.fixture
def broken_model(tiny_sd: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies ``tiny_sd`` and applies what is passed, a function of the copy's folder, to it."""

    def build(damage: Callable[[Path], Any]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny_sd, folder)
        damage(folder)
        return folder

    return build
