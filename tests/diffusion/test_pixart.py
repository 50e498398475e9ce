from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import build_pixart
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import PixArtAlpha, PixArtSigma
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import layer_label, match_parameters
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.diffusion.text_ways import way_of

PROMPTS, SEEDS, STEPS = ["A dog at sunset", "an owl"], [11, 5], 3


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PixArt-Alpha for 1024 pixels, which is told the size of a picture."""
    return build_pixart(tmp_path_factory.mktemp("models") / "told", alpha=True, sample_size=128)


@pytest.fixture(params=["tiny_pixart", "tiny_pixart_sigma", "told"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def loaded(folder: Path) -> PixArtAlpha:
    """With pictures of 16 by 16 pixels."""
    found = load_pipeline(str(folder))
    assert isinstance(found, PixArtAlpha)
    found.transformer.register_to_config(sample_size=8)  # its embeddings of positions stay as they are
    assert found.picture_size == (16, 16)
    return found


def drawn_by(folder: Path, pipeline: PixArtAlpha, guidance_scale: float, **options: Any) -> Tensor:
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(theirs).__name__ == type(pipeline).index_class
    theirs.set_progress_bar_config(disable=True)
    found: Tensor = theirs(
        options.pop("prompts", PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=pipeline.initial_noise(SEEDS),
        height=16,
        width=16,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
        **options,
    ).images
    return found


# --- pictures


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_pictures_equal_those_of_diffusers(guidance_scale: float, folder: Path) -> None:
    pipeline = loaded(folder)
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert drawn.shape == (2, 3, 16, 16)
    assert_close(drawn, drawn_by(folder, pipeline, guidance_scale), rtol=0, atol=1e-4)
    other = pipeline.draw(PROMPTS[::-1], SEEDS, STEPS, guidance_scale)
    assert (drawn - other).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    own = isinstance(pipeline, PixArtSigma)
    assert pipeline.texts[0].length == (300 if own else 120)


def test_guidance_leads_away_from_the_given_prompt(tiny_pixart: Path) -> None:
    pipeline = loaded(tiny_pixart)
    negative = pipeline.encode(["a castle"])
    drawn = pipeline.decode(pipeline.draw_latents(pipeline.encode(PROMPTS), SEEDS, STEPS, 4.5, negative))
    expected = drawn_by(tiny_pixart, pipeline, 4.5, negative_prompt=["a castle"] * 2)
    assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert (drawn - pipeline.draw(PROMPTS, SEEDS, STEPS, 4.5)).abs().max() > 1e-3


def test_a_prompt_is_read_in_lower_case(tiny_pixart: Path) -> None:
    pipeline = loaded(tiny_pixart)
    (mixed,), (lower,) = (pipeline.tokenize([text]).ids for text in ("A Dog at Sunset", "a dog at sunset"))
    assert torch.equal(mixed, lower)
    reader = BaseModel.find(str(tiny_pixart)).reader
    assert reader is not None and reader.ids(["A DOG"]) == reader.ids(["a dog"]) == pipeline.reader.ids(["a dog"])
    text, prompt = pipeline.texts[0], "An Owl and a DOG"
    marked = text.names_mask([prompt], lambda text: [(13, 16)])  # the place in the prompt as it is written
    assert text.names_of(text.tokenize([prompt])[marked].tolist())[-1].lstrip("▁") == "dog"


def test_a_size_is_told_where_diffusers_tells_it(told: Path, tiny_pixart: Path) -> None:
    given: list[Any] = []
    for folder in (told, tiny_pixart):
        pipeline = loaded(folder)
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["added_cond_kwargs"]), with_kwargs=True
        )
        with torch.no_grad():
            pipeline.predict(pipeline.initial_noise(SEEDS), torch.tensor(500), pipeline.encode(PROMPTS))
    assert given[0]["resolution"].tolist() == [[16, 16]] * 2 and given[0]["aspect_ratio"].tolist() == [[1]] * 2
    assert given[1] == {"resolution": None, "aspect_ratio": None}


@pytest.mark.parametrize("out_channels", [4, 8])
def test_a_predicted_variance_is_left_out(out_channels: int, tmp_path: Path) -> None:
    folder = build_pixart(tmp_path / "model", alpha=True, out_channels=out_channels)
    pipeline = loaded(folder)
    noise, condition = pipeline.initial_noise(SEEDS), pipeline.encode(PROMPTS).detach()
    with torch.no_grad():
        whole = pipeline.transformer(
            noise, condition.states, torch.tensor([500, 500]), {}, encoder_attention_mask=condition.mask
        ).sample
        found = pipeline.predict(noise, torch.tensor(500), condition)
    assert whole.shape[1] == out_channels
    assert torch.equal(found, whole[:, :4])
    assert_close(pipeline.draw(PROMPTS, SEEDS, STEPS, 4.5), drawn_by(folder, pipeline, 4.5), rtol=0, atol=1e-4)


# --- what is read


def test_a_condition_is_the_t5_without_padding(tiny_pixart: Path) -> None:
    pipeline = loaded(tiny_pixart)
    read = pipeline.tokenizer(["a dog at sunset", "an owl"], padding="max_length", max_length=120, return_tensors="pt")
    expected = pipeline.text_encoder(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
    condition = pipeline.encode(PROMPTS)
    mask = read.attention_mask.bool()
    assert condition.pooled is None and condition.mask is not None
    assert torch.equal(condition.mask, mask) and mask.sum(1).min() < 10
    assert_close(condition.states[mask], expected[mask], rtol=0, atol=0)
    assert not condition.states[~mask].any() and expected[~mask].any()


def test_nothing_reads_the_padding(tiny_pixart: Path) -> None:
    pipeline = loaded(tiny_pixart)
    noise, condition = pipeline.initial_noise(SEEDS), pipeline.encode(PROMPTS).detach()
    assert condition.mask is not None
    predicted = []
    with torch.no_grad():
        for change in (0.0, 5.0, -5.0):
            states = condition.states + change * ~condition.mask.unsqueeze(-1)
            other = replace(condition, states=states)
            predicted.append(pipeline.predict(noise, torch.tensor(500), other))
        changed = replace(condition, states=condition.states + 5.0)
        assert (pipeline.predict(noise, torch.tensor(500), changed) - predicted[0]).abs().max() > 1e-3
    assert_close(predicted[1], predicted[0], rtol=0, atol=1e-6)
    assert_close(predicted[2], predicted[0], rtol=0, atol=1e-6)


def test_padding_is_what_follows_the_last_token(tiny_pixart: Path) -> None:
    text = loaded(tiny_pixart).texts[0]
    ids = torch.tensor([[5, 0, 7, 1, 0, 0], [1, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 1]])  # a prompt may have the token
    assert text.reads(ids).sum(1).tolist() == [4, 1, 6]
    whole = replace(text, masked=False)
    assert whole.reads(ids).all()
    states, stream = text.states(ids), text.stream(ids)
    assert_close(text.model.encoder.final_layer_norm(stream), states, rtol=0, atol=1e-5)
    assert (whole.states(ids)[0, 0] - states[0, 0]).abs().max() > 1e-3  # the T5 itself reads no padding


def test_the_inputs_of_the_maps_are_what_they_read(tiny_pixart: Path) -> None:
    pipeline = loaded(tiny_pixart)
    names = [name for group in ("context", "xattn-kv") for name in match_parameters(group, pipeline.named_parameters())]
    names = [name for name in names if name.endswith("weight")]
    condition = pipeline.encode(PROMPTS).detach()
    with capture_inputs(pipeline.sites(names)) as seen, torch.no_grad():
        pipeline.predict(pipeline.initial_noise(SEEDS), torch.tensor(500), condition)
    inputs = pipeline.first_inputs(condition)
    for name in names:
        assert_close(seen[name], inputs[str(way_of(name))], rtol=0, atol=1e-5)
    assert {way_of(name) for name in names} == set(inputs) == set(pipeline.ways)


def test_sites_of_the_groups(tiny_pixart: Path) -> None:
    names = list(loaded(tiny_pixart).named_parameters())
    blocks = [f"transformer.transformer_blocks.{number}" for number in range(2)]
    expected = {
        "context": {"transformer.caption_projection.linear_1.weight"},
        "xattn": {name for name in names if ".attn2." in name},
        "xattn-kv": {f"{block}.attn2.to_{kind}.weight" for block in blocks for kind in "kv"},
        "xattn-v": {f"{block}.attn2.to_v.weight" for block in blocks},
        "selfattn": {name for name in names if ".attn1." in name},
        "text-fc2": {f"text_encoder.encoder.block.{n}.layer.1.DenseReluDense.wo.weight" for n in range(2)},
        "embedding": {"text_encoder.shared.weight"},
        "full": {name for name in names if name.startswith("transformer.")},
    }
    for group, sites in expected.items():
        assert set(match_parameters(group, names)) == sites, group
    for group in ("joint-kv", "noxattn", "esd-u"):
        with pytest.raises(ValueError, match="selects no parameter"):
            match_parameters(group, names)
    labels = [layer_label(name) for name in names if way_of(name)]
    assert sorted(labels) == ["block 0 K", "block 0 V", "block 1 K", "block 1 V", "context"]


# --- files


def test_what_is_saved_is_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline = loaded(folder)
    before = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.5)
    with torch.no_grad():
        pipeline.transformer.caption_projection.linear_1.weight.mul_(-1)  # type: ignore[union-attr]
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.5)
    assert (drawn - before).abs().max() > 1e-2
    pipeline.transformer.register_to_config(sample_size=load_pipeline(str(folder)).latent_shape[1])
    pipeline.save(tmp_path / "saved")
    stored = [
        json.loads((path / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
        for path in (folder, tmp_path / "saved")
    ]
    assert stored[0]["normalizer"] == stored[1]["normalizer"]
    again = loaded(tmp_path / "saved")
    assert_close(again.draw(PROMPTS, SEEDS, STEPS, 4.5), drawn, rtol=0, atol=1e-6)
    assert_close(drawn_by(tmp_path / "saved", again, 4.5), drawn, rtol=0, atol=1e-4)
    base = BaseModel.find(str(tmp_path / "saved"))
    assert base.family is type(pipeline) and set(base.names) == set(pipeline.named_parameters())
    assert base.sha256(torch.float32) == WholeModel.loaded(pipeline).sha256()
    base.check_steps(STEPS, "steps")


def test_a_transformer_may_be_named_as_when_it_was_published(tiny_pixart: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pixart, tmp_path / "copy")
    edit(tmp_path / "copy", "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(tmp_path / "copy", "transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    pipeline = loaded(tmp_path / "copy")
    expected = loaded(tiny_pixart).draw(PROMPTS, SEEDS, STEPS, 4.5)
    assert torch.equal(pipeline.draw(PROMPTS, SEEDS, STEPS, 4.5), expected)


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another T5": ("transformer/config.json", {"caption_channels": 64}, "caption_channels=64 and .*d_model=48"),
    "no projection": ("transformer/config.json", {"caption_channels": None}, "caption_channels=None and .*d_model=48"),
    "other latents": ("transformer/config.json", {"in_channels": 8}, "in_channels=8 and vae latent_channels=4"),
    "other outputs": ("transformer/config.json", {"out_channels": 6}, "out_channels=6 and vae latent_channels=4"),
    "another width": (
        "transformer/config.json",
        {"cross_attention_dim": 32},
        "cross_attention_dim=32 and .*attention_head_dim=24",
    ),
    "a size between patches": ("transformer/config.json", {"sample_size": 7}, "sample_size=7: give .*patch_size=2"),
    "a size that is not told": (
        "transformer/config.json",
        {"use_additional_conditions": True},
        "takes the size of a picture, which diffusers gives to models of sample_size=128: copy",
    ),
    "flow matching": (
        "model_index.json",
        {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
        "is not for models that predict noise or velocity",
    ),
    "a CLIP": ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "only T5EncoderModel is supp"),
    "a UNet": ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "with unet, which is not supp"),
}


@pytest.mark.parametrize(("file", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    file: str, changes: dict[str, Any], reason: str, tiny_pixart: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pixart, tmp_path / "copy")
    edit(tmp_path / "copy", file, **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        check_model(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)


def test_sigma_is_not_told_a_size(told: Path, tmp_path: Path) -> None:
    shutil.copytree(told, tmp_path / "copy")
    edit(tmp_path / "copy", "model_index.json", _class_name="PixArtSigmaPipeline")
    with pytest.raises(ValueError, match=r"sample_size=128 and use_additional_conditions=None, .* to none of this fam"):
        check_model(str(tmp_path / "copy"))
    edit(tmp_path / "copy", "transformer/config.json", use_additional_conditions=False)
    with pytest.raises(ValueError, match=r"has the weight 'adaln_single\.emb"):
        check_model(str(tmp_path / "copy"))
