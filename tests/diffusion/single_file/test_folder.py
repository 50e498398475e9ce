"""A single file is loaded as the folder that it was made of, and what it does not hold is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_families import as_single_file, build_flux
from torch import Tensor

from helpers import LAYERS
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.diffusion.source import read_config
from lit_unlearn.diffusion.stored import WholeModel

MODELS = (
    *("tiny_sd", "tiny_sd3"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_sdxl", "tiny_sd3_without_t5", "tiny_flux")),
)


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of FLUX.1 dev; not to be written to."""
    return build_flux(tmp_path_factory.mktemp("models") / "tiny-flux", True, shift=3.0, use_dynamic_shifting=True)


def assert_same(found: WholeModel, expected: WholeModel) -> None:
    assert list(found.parts) == list(expected.parts)
    for part, weights in expected.parts.items():
        assert set(found.parts[part]) == set(weights)
        for name, value in weights.items():
            other = found.parts[part][name]
            assert (other.dtype, other.shape) == (value.dtype, value.shape), name
            assert torch.equal(other, value), name


@pytest.mark.parametrize("model", MODELS)
def test_a_file_is_the_folder_that_it_was_made_of(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(model)
    file = as_single_file(folder, tmp_path / "model.safetensors")
    base, other = BaseModel.find(str(file), config_folder=str(folder)), BaseModel.find(str(folder))
    assert base.family is other.family
    assert set(base.names) == set(other.names)
    assert base.sha256(torch.float32) == other.sha256(torch.float32)
    first, second = base.load(), other.load()
    assert_same(WholeModel.loaded(first), WholeModel.loaded(second))
    drawn = [pipeline.draw(["a dog"], [0], 2, 3.0) for pipeline in (first, second)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)
    assert drawn[0].std() > 1e-2


@pytest.mark.slow
def test_half_precision_is_loaded_as_any_type(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sdxl, tmp_path / "fp16.safetensors", torch.float16)
    found = BaseModel.find(str(file), config_folder=str(tiny_sdxl)).load(torch.bfloat16)
    for name, value in load_pipeline(str(tiny_sdxl)).named_parameters().items():
        assert torch.equal(found.named_parameters()[name], value.half().bfloat16()), name


@pytest.mark.parametrize("model", [pytest.param("tiny_sdxl", marks=pytest.mark.slow), "tiny_sd3"])
def test_diffusers_reads_the_same_denoiser(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(model)
    file = as_single_file(folder, tmp_path / "model.safetensors")
    kind, part = (UNet2DConditionModel, "unet") if model == "tiny_sdxl" else (SD3Transformer2DModel, "transformer")
    read: Any = kind.from_single_file(str(file), config=str(folder), subfolder=part, local_files_only=True)
    ours = BaseModel.find(str(file), config_folder=str(folder)).load().parts[part]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, read.state_dict()[name]), name


@pytest.mark.parametrize(
    ("model", "part"), [("tiny_sd", "unet"), ("tiny_sd3", "transformer"), ("tiny_flux", "transformer")]
)
def test_a_denoiser_alone_takes_the_rest_from_the_folder(
    model: str, part: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(model)
    file = as_single_file(folder, tmp_path / "model.safetensors", parts=[part], prefix="")
    key, values = next(iter(load_file(file).items())), load_file(file)
    values[key[0]] = values[key[0]] + 1
    save_file(values, file)
    base = BaseModel.find(str(file), config_folder=str(folder))
    found, before = WholeModel.loaded(base.load()), WholeModel.in_folder(folder)
    differing = [name for name in before.names() if not torch.equal(found[name], before[name])]
    assert {name.partition(".")[0] for name in differing} == {part}  # of the file
    assert f"and vae: read from config_folder={str(folder)!r}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"holds {part} alone, and it lacks text_encoder.* and vae: give config_fo"):
        BaseModel.find(str(file))


def tokenizers_only(folder: Path, made: Path) -> Path:
    for place in folder.glob("tokenizer*"):
        shutil.copytree(place, made / place.name)
    return made


def sampler(base: BaseModel) -> dict[str, Any]:
    content: dict[str, Any] = read_config(base.fetch() / "scheduler" / "scheduler_config.json")
    return content


def test_what_predicts_a_velocity_says_so(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sdxl, tmp_path / "v.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    config = sampler(BaseModel.find(str(file), config_folder=str(tiny_sdxl)))
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    file = as_single_file(tiny_sdxl, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "v"})
    config = sampler(BaseModel.find(str(file), config_folder=str(tiny_sdxl)))
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", False)


def test_a_projection_that_is_left_out_is_the_identity(tmp_path: Path, tiny_sd3: Path) -> None:
    file = as_single_file(tiny_sd3, tmp_path / "model.safetensors")
    stored, key = load_file(file), "text_encoders.clip_l.transformer.text_projection.weight"
    del stored[key]
    save_file(stored, file)
    base = BaseModel.find(str(file), config_folder=str(tiny_sd3))
    name = "text_encoder.text_projection.weight"
    values = base.weights([name], torch.float32)
    assert values is not None and torch.equal(values[name], torch.eye(16))


def test_without_a_t5_it_is_said(tmp_path: Path, tiny_sd3_without_t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = as_single_file(tiny_sd3_without_t5, tmp_path / "model.safetensors")
    base = BaseModel.find(str(file), config_folder=str(tiny_sd3_without_t5))
    assert "has no text_encoder_3 (text_encoders.t5xxl.*), and prompts are read without it" in capsys.readouterr().err
    assert not any(name.startswith("text_encoder_3") for name in base.names)


Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def _renamed(values: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in values.items()}


CHANGES: list[tuple[str, Change, str]] = [
    (
        "averaged",
        lambda values: _renamed(values, "model.diffusion_model.", "model_ema.diffusion_model"),
        r"holds text_encoder and vae and no denoiser \(only an averaged copy of it, model_ema.\*\): give a checkpoint",
    ),
    (
        "no_vae",
        lambda values: {key: value for key, value in values.items() if not key.startswith("first_stage")},
        r"holds unet and text_encoder alone, and config_folder='.*' lacks vae: give config_folder=FOLDER",
    ),
    (
        "inpainting",
        lambda values: values | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
        r"\(unet\): .* has 'conv_in.weight' of the shape \(32, 9, 3, 3\), and the UNet2DConditionModel of Stable Diff"
        r".*: give a whole model that draws from text alone, or config_folder=FOLDER with its own config.json",
    ),
    (
        "more",
        lambda values: values | {"model.diffusion_model.input_blocks.9.0.weight": torch.zeros(1)},
        r"has the weight 'model.diffusion_model.input_blocks.9.0.weight', which the UNet2DConditionModel .* does not",
    ),
    (
        "cut",
        lambda values: {key: value for key, value in values.items() if "out.2.bias" not in key},
        r"\(unet\):  lacks the weight 'conv_out.bias' of the UNet2DConditionModel",
    ),
    (
        "nf4",
        lambda values: (
            values
            | {"model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4": torch.zeros(1, dtype=torch.uint8)}
        ),
        r"is quantised \(nf4 of bitsandbytes, by its tensor .*\), which is too coarse for an edit",
    ),
    (
        "fp8",
        lambda values: (
            values | {key: values[key].to(torch.float8_e4m3fn) for key in ["model.diffusion_model.out.2.weight"]}
        ),
        "has 'conv_out.weight' as F8_E4M3: quantized weights cannot be edited, take those of 16 or 32 bits",
    ),
    (
        "lora",
        lambda values: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32)},
        "holds LoRA weights, no model: give the checkpoint of the model",
    ),
    (
        "unknown",
        lambda values: {"blocks.0.weight": torch.zeros(1)},
        "is no checkpoint of Stable Diffusion 1, 2, XL, 3",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=name) for name, c, m in CHANGES])
def test_what_is_wrong_with_a_file_is_said(change: Change, message: str, tiny_sd: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    save_file(dict(change(load_file(file))), file)
    given = shutil.copytree(tiny_sd, tmp_path / "given")
    shutil.rmtree(given / "vae")
    (given / "vae").mkdir()
    shutil.copyfile(tiny_sd / "vae" / "config.json", given / "vae" / "config.json")
    with pytest.raises(ValueError, match=message):
        BaseModel.find(str(file), config_folder=str(given))


def test_a_missing_tokenizer_and_one_of_another_size_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"needs tokenizer, which a single file does not hold: give config_folder=FOLDER with tokenizer/, or "
        r"download them into the hub's cache with `hf download stable-diffusion-v1-5/\S+ --include \"tokenizer/\*\"`",
    ):
        BaseModel.find(str(file))
    given = shutil.copytree(tiny_sd, tmp_path / "given")
    shutil.rmtree(given / "tokenizer")
    (given / "tokenizer").mkdir()
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (given / "tokenizer" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (given / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tokenizer knows 2 tokens, and the text encoder embeds vocab_size=\d+: "):
        BaseModel.find(str(file), config_folder=str(given))


def test_a_tokenizer_of_the_cache_is_taken(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    given = tokenizers_only(tiny_sd, tmp_path / "cached")
    asked = []

    def cached(repo: str, name: str, **_: Any) -> str | None:
        asked.append(repo)
        return str(given / name) if repo == "CompVis/stable-diffusion-v1-4" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    with pytest.raises(ValueError, match=r"the tokenizer knows \d+ tokens, and the text encoder embeds vocab_size=494"):
        BaseModel.find(str(file))
    assert asked[-1] == "CompVis/stable-diffusion-v1-4"


def test_the_folder_is_checked(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"config_folder='.*' is of Stable Diffusion XL, and model='.*' of Stable Diffus"
    ):
        BaseModel.find(str(file), config_folder=str(tiny_sdxl))
    with pytest.raises(ValueError, match="config_folder='none' is no folder: give one in the diffusers layout"):
        BaseModel.find(str(file), config_folder="none")
    for model in (str(tiny_sd), "owner/name"):
        with pytest.raises(ValueError, match=r"config_folder='x' has no effect: model='.*' is no single file; leav"):
            BaseModel.find(model, config_folder="x")


def test_stable_diffusion_2_does_not_say_what_it_predicts(
    tiny_sd2: Path, single_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = single_file(tiny_sd2, tmp_path / "model.safetensors", encoder=("cond_stage_model.model.", names.open_clip))
    given = shutil.copytree(tiny_sd2, tmp_path / "given")
    assert sampler(BaseModel.find(str(file), config_folder=str(given)))["prediction_type"] == "v_prediction"
    other = shutil.copytree(given, tmp_path / "other")
    shutil.rmtree(other / "scheduler")
    with pytest.raises(ValueError, match="of Stable Diffusion 2 and does not say whether it predicts noise or a velo"):
        BaseModel.find(str(file), config_folder=str(other))


def test_an_edit_reads_only_what_it_needs(tiny_sd: Path, tmp_path: Path) -> None:
    file = as_single_file(tiny_sd, tmp_path / "model.safetensors")
    base, other = BaseModel.find(str(file), config_folder=str(tiny_sd)), BaseModel.find(str(tiny_sd))
    assert base.fingerprint(LAYERS, torch.float32) == other.fingerprint(LAYERS, torch.float32)
    assert (base.single_file, other.single_file) == (file, None)


def test_a_folder_with_lora_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"holds LoRA weights, no model: give the model, or merge both .* fuse_lora\(\)"
    ):
        BaseModel.find(str(tmp_path))
