from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lit_unlearn.diffusion.families import StableDiffusion3
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import layer_index, layer_label, match_parameters

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3


def loaded(folder: Path) -> StableDiffusion3:
    found = load_pipeline(str(folder))
    assert isinstance(found, StableDiffusion3)
    return found


def test_a_condition_is_padded_clips_then_the_t5(tiny_sd3: Path, tiny_sd3_without_t5: Path) -> None:
    pipeline = loaded(tiny_sd3)
    condition, ids = pipeline.encode(PROMPTS), pipeline.tokenize(PROMPTS).ids
    first, second = (
        model(part, output_hidden_states=True)
        for model, part in zip((pipeline.text_encoder, pipeline.text_encoder_2), ids[:2], strict=True)
    )
    assert pipeline.text_encoder_3 is not None
    third = pipeline.text_encoder_3(ids[2]).last_hidden_state
    assert condition.states.shape == (2, 32 + 256, 48)
    clips = condition.states[:, :32]
    assert_close(clips[..., :40], torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), rtol=0, atol=0)
    assert clips[..., 40:].abs().max() == 0
    assert_close(condition.states[:, 32:], third, rtol=0, atol=0)
    assert condition.pooled is not None
    assert_close(condition.pooled, torch.cat([first.text_embeds, second.text_embeds], -1), rtol=0, atol=0)
    without = loaded(tiny_sd3_without_t5).encode(PROMPTS)
    assert_close(without.states[:, :32], clips, rtol=0, atol=0)
    assert without.states.shape == condition.states.shape and without.states[:, 32:].abs().max() == 0


def test_sites_of_the_groups(tiny_sd3: Path) -> None:
    pipeline = loaded(tiny_sd3)
    names = list(pipeline.named_parameters())
    # The text leads nowhere behind the last block. The last layers of the CLIPs reach the pooled vector.
    last = "transformer.transformer_blocks.1.attn"
    assert pipeline.unread(names) == [
        f"{last}.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    ]
    counts = {"text_encoder": 3, "text_encoder_2": 4}
    clips = [f"{part}.text_model.encoder.layers.{number}" for part in counts for number in range(counts[part])]
    t5 = [f"text_encoder_3.encoder.block.{number}.layer.1.DenseReluDense" for number in range(2)]
    expected = {
        "context": {
            "transformer.context_embedder.weight",
            "transformer.time_text_embed.text_embedder.linear_1.weight",
        },
        "joint-kv": {
            f"transformer.transformer_blocks.{block}.attn.{name}.weight"
            for block in range(2)
            for name in ("add_k_proj", "add_v_proj")
        },
        "text-fc2": {*(f"{layer}.mlp.fc2.weight" for layer in clips), *(f"{layer}.wo.weight" for layer in t5)},
        "text-fc1": {
            *(f"{layer}.mlp.fc1.weight" for layer in clips),
            *(f"{layer}.{name}.weight" for layer in t5 for name in ("wi_0", "wi_1")),
        },
        "embedding": {
            *(f"{part}.text_model.embeddings.token_embedding.weight" for part in counts),
            "text_encoder_3.shared.weight",
        },
        "full": {name for name in names if name.startswith("transformer.")},
    }
    for group, sites in expected.items():
        assert set(match_parameters(group, names)) == sites, group
    for group in ("context", "joint-kv", "text-fc1", "text-fc2"):
        assert set(pipeline.sites(sorted(expected[group]))) == expected[group]
    with pytest.raises(ValueError, match="selects no parameter"):
        match_parameters("xattn", names)  # its attn2 is between parts of the picture
    assert any(".attn2." in name for name in names)
    assert layer_index("text_encoder_3.encoder.block.1.layer.1.DenseReluDense.wo.weight") == 1
    labels = [layer_label(name) for group in ("context", "joint-kv") for name in match_parameters(group, names)]
    assert sorted(labels) == ["block 0 K", "block 0 V", "block 1 K", "block 1 V", "context", "pooled"]


def test_every_encoder_moves_pictures(tiny_sd3: Path) -> None:
    pipeline = loaded(tiny_sd3)
    before = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    for name in match_parameters("text-fc2", pipeline.named_parameters()):
        weight = pipeline.linear(name).weight
        with torch.no_grad():
            weight.mul_(-1)
            assert (pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0) - before).abs().max() > 1e-3, name
            weight.mul_(-1)


def test_timesteps_depend_on_the_size_if_the_scheduler_says_so(tiny_sd3: Path, tiny_sd3_without_t5: Path) -> None:
    fixed, dynamic = loaded(tiny_sd3).noise, loaded(tiny_sd3_without_t5).noise
    assert (fixed.num_patches, fixed.step_arguments(4)) == (16, {})  # type: ignore[union-attr]
    assert set(dynamic.step_arguments(4)) == {"mu"}
    assert (fixed.timesteps(4) - dynamic.timesteps(4)).abs().max() > 10


def test_there_is_no_ddim(tiny_sd3: Path) -> None:
    with pytest.raises(ValueError, match="sampler='ddim' is not for models of flow matching"):
        loaded(tiny_sd3).with_sampler("ddim")


# --- what is refused


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another T5": ("transformer/config.json", {"joint_attention_dim": 64}, "joint_attention_dim=64 and .*d_model=48"),
    "another pooled vector": (
        "transformer/config.json",
        {"pooled_projection_dim": 40},
        "pooled_projection_dim=40 and .*together=36",
    ),
    "other latents": ("transformer/config.json", {"in_channels": 4}, "transformer in_channels=4 and vae latent_ch"),
    "a size between patches": ("transformer/config.json", {"sample_size": 7}, "sample_size=7: give .* patch_size=2"),
    "no shift": ("vae/config.json", {"shift_factor": None}, "no shift_factor"),
    "a tokenizer alone": ("model_index.json", {"text_encoder_3": [None, None]}, "tokenizer_3 and no text_encoder_3"),
    "other noise": (
        "model_index.json",
        {"scheduler": ["diffusers", "DDIMScheduler"]},
        "'DDIMScheduler', which is not for models of flow matching: .*FlowMatchEuler",
    ),
    "noise in its steps": (
        "scheduler/scheduler_config.json",
        {"stochastic_sampling": True},
        "stochastic_sampling=True",
    ),
    "a UNet": ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "with unet, which is not supp"),
}


@pytest.mark.parametrize(("file", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    file: str, changes: dict[str, Any], reason: str, tiny_sd3: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "copy")
    edit(tmp_path / "copy", file, **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        check_model(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)
