from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.emoji.text_encoder import MAX_LENGTH

Damage = Callable[[Path], Any]
STEM = "diffusion_pytorch_model"
LEFT_OUT = object()


def edit(file: str, **changes: Any) -> Damage:
    """Changes keys of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / file
        content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not LEFT_OUT}), encoding="utf-8")

    return damage


def weights(part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    """Changes the weights of a part."""

    def damage(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def renamed(part: str, before: str) -> Damage:
    return weights(part, lambda found: {before + name: value for name, value in found.items()})


def added(part: str, name: str) -> Damage:
    return weights(part, lambda found: {**found, name: torch.zeros(2, 2)})


def changed(part: str, name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return weights(part, lambda found: {**found, name: change(found[name])})


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").write_text("{}", encoding="utf-8")


def scheduler(kind: str, **config: Any) -> Damage:
    def damage(folder: Path) -> None:
        edit("model_index.json", scheduler=["diffusers", kind])(folder)
        edit("scheduler/scheduler_config.json", _class_name=kind, **config)(folder)

    return damage


BROKEN = {
    # names of weights
    "the original code's": (
        renamed("text_encoder", "cond_stage_model.transformer."),
        r"model\.safetensors has the weight 'cond_stage_model\.transformer\..* 52 missing.*give the single file",
    ),
    "the original code's UNet": (added("unet", "input_blocks.0.0.weight"), "give the single file that it came from"),
    "a wrapper's": (renamed("unet", "module."), "save it again without 'module.'"),
    "an adapter": (added("unet", "conv_in.lora_A.weight"), "fuse_lora"),
    "one too many": (added("vae", "extra"), r"has the weight 'extra', .*\(0 more unknown, 0 missing\)"),
    "one missing": (
        weights("vae", lambda found: {k: v for k, v in found.items() if k != "encoder.conv_in.bias"}),
        "vae/ lacks the weight 'encoder.conv_in.bias'",
    ),
    "another shape": (
        changed("unet", "conv_in.bias", lambda value: torch.cat([value, value])),
        r"'conv_in.bias' of the shape \(32,\), .* of \(16,\)",
    ),
    "integers": (changed("unet", "conv_in.bias", lambda value: value.char()), "as I8: quantized"),
    "a dead link": (
        lambda folder: (
            (folder / f"vae/{STEM}.safetensors").rename(folder / "elsewhere")
            and (folder / f"vae/{STEM}.safetensors").symlink_to("nowhere")
        ),
        f"{STEM}.safetensors cannot be read \\(No such file",
    ),
    "no index": (
        lambda folder: (folder / f"vae/{STEM}.safetensors").rename(folder / f"vae/{STEM}-00001-of-00001.safetensors"),
        rf"no {STEM}\.safetensors\.index\.json that lists them",
    ),
    "twice": (
        weights("text_encoder", lambda found: {**found, "text_model.final_layer_norm.bias": torch.zeros(32)}),
        "which are the same weight",
    ),
    # classes
    "another autoencoder": (edit("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "vae 'AutoencoderTiny'"),
    "an autoencoder left out": (edit("model_index.json", vae=[None, None]), "lacks vae"),
    "code of one's own": (
        edit("model_index.json", unet=["mine", "UNet2DConditionModel"]),
        "unet 'UNet2DConditionModel' of .mine. .* code of its own",
    ),
    "a UNet of one's own": (edit("model_index.json", unet=["mine", "MyUNet"]), "unet 'MyUNet'"),
    "SDXL": (
        edit("model_index.json", _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIP"]),
        "lacks tokenizer_2: a StableDiffusionXLPipeline has",
    ),
    "a family that is not known": (
        edit("model_index.json", _class_name="LuminaPipeline", unet=LEFT_OUT),
        r"is a LuminaPipeline, .* known are StableDiffusionPipeline \(Stable Diffusion 1.x and 2.x\), "
        r"StableDiffusionXLPipeline \(Stable Diffusion XL\)",
    ),
    "a ControlNet": (edit("model_index.json", controlnet=["diffusers", "ControlNetModel"]), "with controlnet"),
    "no class": (edit("model_index.json", _class_name=LEFT_OUT), "has no _class_name"),
    # forms
    "inpainting": (edit("unet/config.json", in_channels=9), "unet in_channels=9 and vae latent_channels=4"),
    "learned variance": (edit("unet/config.json", out_channels=8), "unet out_channels=8"),
    "an autoencoder of others": (edit("vae/config.json", latent_channels=16), "vae latent_channels=16"),
    "masks": (edit("vae/config.json", in_channels=4), "pictures have 3"),
    "guidance": (edit("unet/config.json", time_cond_proj_dim=16), "time_cond_proj_dim=16"),
    "classes": (edit("unet/config.json", class_embed_type="timestep"), "class_embed_type='timestep'"),
    "sizes": (
        edit("unet/config.json", addition_embed_type="text_time", projection_class_embeddings_input_dim=8),
        "addition_embed_type='text_time'",
    ),
    "projected states": (edit("unet/config.json", encoder_hid_dim=32), "encoder_hid_dim=32"),
    "another width": (edit("unet/config.json", cross_attention_dim=64), "cross_attention_dim=64 .* hidden_size=32"),
    "no size": (edit("unet/config.json", sample_size=None), "sample_size=None"),
    "quantized": (edit("unet/config.json", quantization_config={"load_in_8bit": True}), "quantization_config"),
    "an adapter beside": (lambda folder: (folder / "text_encoder/adapter_config.json").touch(), "adapter_config.json"),
    "no such block": (edit("unet/config.json", down_block_types=["A", "B"]), "describes no UNet2DConditionModel"),
    "no number": (edit("text_encoder/config.json", hidden_size="wide"), "describes no CLIPTextModel"),
    # tokenizers
    "too long": (edit("tokenizer/tokenizer_config.json", model_max_length=77), f"=77, .*set it to {MAX_LENGTH}"),
    "a larger vocabulary": (edit("text_encoder/config.json", vocab_size=1000), "vocab_size=1000"),
    "no vocabulary": (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "neither tokenizer.json nor"),
    "a broken one": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}", encoding="utf-8"),
        "cannot be read",
    ),
    # schedulers
    "flow matching": (scheduler("FlowMatchEulerDiscreteScheduler"), "'FlowMatchEulerDiscreteScheduler', which is not"),
    "flow sigmas": (scheduler("DPMSolverMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas=True"),
    "no DDPM": (scheduler("EDMEulerScheduler"), "'EDMEulerScheduler', which is not for"),
    "inverse": (scheduler("DDIMInverseScheduler"), "'DDIMInverseScheduler', which is not for"),
    "more inputs": (scheduler("RePaintScheduler"), "'RePaintScheduler', which is not for"),
    "another target": (scheduler("DDIMScheduler", prediction_type="sample"), "prediction_type='sample'"),
    "unknown": (scheduler("MyScheduler"), "'MyScheduler', which is not in diffusers"),
    "no model": (
        edit("model_index.json", scheduler=["diffusers", "AutoencoderKL"]),
        "'AutoencoderKL', which is not",
    ),
    "no schedule": (scheduler("DDIMScheduler", beta_schedule="mine"), "DDIMScheduler, cannot be made"),
}


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded_as_it_is_is_refused(
    damage: Damage, reason: str, broken_model: Callable[..., Path], tiny_sd: Path
) -> None:
    assert check_model(str(tiny_sd))
    with pytest.raises(ValueError, match=reason) as caught:
        check_model(str(broken_model(damage)))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("scipy") is not None, reason="scipy is installed")
def test_what_a_scheduler_needs_is_named(broken_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="'LMSDiscreteScheduler', which needs scipy: install it"):
        check_model(str(broken_model(scheduler("LMSDiscreteScheduler"))))


REST = ("embeddings.position_ids", "text_projection.weight", "logit_scale", "vision_model.embeddings.x")
FINE = {
    "of a whole CLIP": weights("text_encoder", lambda found: {**found, **{name: torch.zeros(2) for name in REST}}),
    "a width for each block": edit("unet/config.json", cross_attention_dim=[32, 32]),
    "a fast tokenizer": edit("model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"]),
    "a safety checker": edit("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]),
    "samplers of few steps": scheduler("LCMScheduler"),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_what_acts_on_nothing_is_accepted(change: Damage, broken_model: Callable[..., Path], tiny_sd: Path) -> None:
    assert check_model(str(broken_model(change))) == check_model(str(tiny_sd))


def test_a_tokenizer_without_a_length_has_the_text_encoders(broken_model: Callable[..., Path]) -> None:
    folder = broken_model(edit("tokenizer/tokenizer_config.json", model_max_length=LEFT_OUT))
    pipeline = load_pipeline(str(folder))
    assert pipeline.texts[0].length == MAX_LENGTH
    assert pipeline.texts[0].tokenize(["a dog"]).shape == (1, MAX_LENGTH)


@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, broken_model: Callable[..., Path]) -> None:
    folder = str(broken_model(changed("unet", name, lambda value: value.index_fill(0, torch.tensor([1]), torch.inf))))
    with pytest.raises(ValueError, match=f"unet has the weight '{name}', which is not finite in float32"):
        load_pipeline(folder)


def test_a_weight_too_large_for_its_type_is_named(broken_model: Callable[..., Path]) -> None:
    folder = str(broken_model(changed("vae", "encoder.conv_in.bias", lambda value: value + 1e6)))
    assert load_pipeline(folder)
    with pytest.raises(ValueError, match=r"'encoder\.conv_in\.bias', which is not finite in float16"):
        load_pipeline(folder, torch.float16)
