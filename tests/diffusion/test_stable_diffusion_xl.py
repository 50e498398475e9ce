from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.families import StableDiffusionXL
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import layer_label, match_parameters

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3


@pytest.fixture
def pipeline(tiny_sdxl: Path) -> StableDiffusionXL:
    found = load_pipeline(str(tiny_sdxl))
    assert isinstance(found, StableDiffusionXL)
    return found


def test_a_condition_is_both_encoders_side_by_side_and_the_pooled_vector(pipeline: StableDiffusionXL) -> None:
    condition = pipeline.encode(PROMPTS)
    ids = pipeline.tokenize(PROMPTS).ids
    first = pipeline.text_encoder(ids[0], output_hidden_states=True)
    second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
    assert_close(condition.states, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), rtol=0, atol=0)
    assert condition.pooled is not None
    assert_close(condition.pooled, second.text_embeds, rtol=0, atol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_leads_away_from_zeros_if_the_model_says_so(zeros: bool, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = changed_copy(tiny_sdxl, tmp_path, "model_index.json", force_zeros_for_empty_prompt=zeros)
    pipeline = load_pipeline(str(folder))
    empty = pipeline.unconditional()
    assert empty.states.shape == (1, 32, 40) and empty.pooled is not None and empty.pooled.shape == (1, 20)
    assert [bool(part.any()) for part in (empty.states, empty.pooled)] == [not zeros] * 2
    assert pipeline.encode([""]).states.abs().max() > 0
    theirs = StableDiffusionXLPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    noise = pipeline.initial_noise(SEEDS)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "latents": noise, "output_type": "pt"}
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    assert_close(drawn, theirs(PROMPTS, guidance_scale=4.0, **options).images, rtol=0, atol=1e-4)
    settings = pipeline.settings()
    assert settings["force_zeros_for_empty_prompt"] is zeros
    assert json.loads(json.dumps(settings)) == settings
    pipeline.save(tmp_path / "saved")
    assert_close(load_pipeline(str(tmp_path / "saved")).draw(PROMPTS, SEEDS, STEPS, 4.0), drawn, rtol=0, atol=1e-6)


def test_sizes_are_the_ones_of_the_whole_picture(pipeline: StableDiffusionXL, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    pipeline.draw(PROMPTS, SEEDS, 1, 4.0)
    assert seen[0].tolist() == [[16, 16, 0, 0, 16, 16]] * 4


def test_half_precision_decodes_in_float32_if_the_autoencoder_must(tiny_sdxl: Path) -> None:
    pipeline = load_pipeline(str(tiny_sdxl), torch.float16)
    assert isinstance(pipeline, StableDiffusionXL) and pipeline.vae.config.force_upcast
    seen: list[torch.dtype] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(module.conv_in.weight.dtype))
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(module.conv_in.weight.dtype))
    before = {name: value.clone() for name, value in pipeline.vae.named_parameters()}
    latents = pipeline.initial_noise(SEEDS).half()
    pictures = pipeline.decode(latents)
    assert pipeline.encode_pictures(pictures).dtype == torch.float16
    assert seen == [torch.float32] * 2
    for name, value in pipeline.vae.named_parameters():
        assert value.dtype == torch.float16 and torch.equal(value, before[name])
    exact = load_pipeline(str(tiny_sdxl))
    for name, value in exact.parts["vae"].named_parameters():
        value.data.copy_(before[name])
    assert_close(pictures, exact.decode(latents.float()), rtol=0, atol=1e-5)
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.decode(latents)
    assert seen[-1] == torch.float16


def test_statistics_of_each_channel_are_used_as_in_diffusers(pipeline: StableDiffusionXL) -> None:
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 0.5, 1.0]}
    pipeline.vae.register_to_config(**statistics)
    theirs = pipeline.to_diffusers()
    theirs.set_progress_bar_config(disable=True)
    latents = pipeline.draw_latents(pipeline.encode(PROMPTS), SEEDS, STEPS, 1.0)
    expected = theirs(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=1.0, latents=pipeline.initial_noise(SEEDS), output_type="pt"
    ).images
    assert_close(pipeline.decode(latents), expected, rtol=0, atol=1e-4)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in statistics.values())
    encoded = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mode()
    expected = (encoded - mean) * pipeline.vae.config.scaling_factor / std
    assert_close(pipeline.encode_pictures(pictures), expected, rtol=0, atol=1e-6)


# --- weights

BLOCKS = [
    *("down_blocks.1.attentions.0.transformer_blocks.0", "down_blocks.1.attentions.0.transformer_blocks.1"),
    *(f"up_blocks.0.attentions.{number}.transformer_blocks.{block}" for number in (0, 1) for block in (0, 1)),
    *("mid_block.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.1"),
]
KV = {f"unet.{block}.attn2.{name}.weight" for block in BLOCKS for name in ("to_k", "to_v")}


@pytest.mark.filterwarnings("ignore:.*leaves out")
def test_sites_of_the_groups(pipeline: StableDiffusionXL) -> None:
    names = list(pipeline.named_parameters())
    unread = pipeline.unread(names)
    expected = {
        "xattn-kv": KV,
        "context": {*KV, "unet.add_embedding.linear_1.weight"},
        "embedding": {
            "text_encoder.embeddings.token_embedding.weight",
            "text_encoder_2.text_model.embeddings.token_embedding.weight",
        },
    }
    for layer in ("fc1", "fc2"):
        expected[f"text-{layer}"] = {
            *(f"text_encoder.encoder.layers.{number}.mlp.{layer}.weight" for number in range(2)),
            *(f"text_encoder_2.text_model.encoder.layers.{number}.mlp.{layer}.weight" for number in range(4)),
        }
    for group, sites in expected.items():
        assert set(match_parameters(group, names, unread)) == sites, group
    assert set(pipeline.sites(sorted(expected["context"]))) == expected["context"]
    with pytest.raises(ValueError, match="selects no parameter"):
        match_parameters("joint-kv", names, unread)
    assert layer_label("unet.add_embedding.linear_1.weight") == "pooled"
    assert layer_label("text_encoder_2.text_model.encoder.layers.3.mlp.fc2.weight") == "encoder 2 layer 3"


def test_what_is_not_read_is_left_out_and_named(pipeline: StableDiffusionXL) -> None:
    names = list(pipeline.named_parameters())
    unread = pipeline.unread(names)
    assert "text_encoder.encoder.layers.2.mlp.fc2.weight" in unread
    assert all(name.startswith(("text_encoder.encoder.layers.2.", "text_encoder.final_layer_norm.")) for name in unread)
    with pytest.warns(
        UserWarning, match=r"'mlp.fc2' leaves out text_encoder\.encoder\.layers\.2\.mlp\.fc2\.weight, .*bias, which"
    ):
        match_parameters("mlp.fc2", names, unread)
    with pytest.raises(ValueError, match=r"selects only text_encoder\.encoder\.layers\.2.* does not read"):
        match_parameters(r"^text_encoder\.encoder\.layers\.2\.mlp\.fc2", names, unread)


def test_what_is_not_read_acts_on_nothing_and_all_else_does(pipeline: StableDiffusionXL) -> None:
    before = pipeline.encode(PROMPTS).detach()
    assert before.pooled is not None

    def moved(part: str, number: int) -> tuple[bool, bool]:
        weight = pipeline.linear(f"{part}.encoder.layers.{number}.mlp.fc2.weight").weight
        with torch.no_grad():
            weight.mul_(-1)
            after = pipeline.encode(PROMPTS)
            weight.mul_(-1)
        assert after.pooled is not None and before.pooled is not None
        return not torch.equal(after.states, before.states), not torch.equal(after.pooled, before.pooled)

    assert [moved("text_encoder", number) for number in range(3)] == [(True, False), (True, False), (False, False)]
    second = [moved("text_encoder_2.text_model", number) for number in range(4)]
    assert second == [(True, True), (True, True), (True, True), (False, True)]


# --- what is refused


def changed_copy(folder: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return tmp_path / "copy"


REFUSED = {
    "another width": ("unet/config.json", {"cross_attention_dim": 48}, "cross_attention_dim=48 and .*together=40"),
    "another pooled vector": (
        "unet/config.json",
        {"projection_class_embeddings_input_dim": 80},
        "projection_class_embeddings_input_dim=80 and .*=68",
    ),
    "no sizes": ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type='text', and"),
    "distilled": ("unet/config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "unet in_channels=9"),
    "another length": (
        "tokenizer_2/tokenizer_config.json",
        {"model_max_length": 16},
        "tokenizer model_max_length=32 and tokenizer_2 model_max_length=16",
    ),
    "too long": ("tokenizer_2/tokenizer_config.json", {"model_max_length": 77}, "tokenizer_2/.*text_encoder_2 reads"),
    "another encoder": (
        "model_index.json",
        {"text_encoder_2": ["transformers", "CLIPTextModel"]},
        "text_encoder_2 'CLIPTextModel' .*only CLIPTextModelWithProjection",
    ),
    "one more": (
        "model_index.json",
        {"controlnet": ["diffusers", "ControlNetModel"]},
        "with controlnet, ",
    ),
    "another process": (
        "model_index.json",
        {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
        "'FlowMatchEulerDiscreteScheduler', which is not for",
    ),
}


@pytest.mark.parametrize(("file", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    file: str, changes: dict[str, Any], reason: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check_model(str(changed_copy(tiny_sdxl, tmp_path, file, **changes)))
    assert "\n" not in str(caught.value)
