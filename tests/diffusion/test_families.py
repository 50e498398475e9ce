"""What holds for every newer family: it loads, draws, goes on, saves and warns as diffusers' own pipeline does."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import FAMILIES
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.image_to_image import image_to_image
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.parameters import layer_index, match_parameters
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.diffusion.text_ways import way_of

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3
MODELS = ["tiny_sdxl", "tiny_sd3", "tiny_sd3_without_t5"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipeline(folder: Path) -> Pipeline:
    return load_pipeline(str(folder))


def is_sdxl(folder: Path) -> bool:
    return (folder / "unet").is_dir()


def loaded_by_diffusers(folder: Path, **options: Any) -> Any:
    """The pipeline in ``folder``; diffusers must be told that there is no T5."""
    if not is_sdxl(folder) and not (folder / "text_encoder_3").exists():
        options.update(text_encoder_3=None, tokenizer_3=None)
    found = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    found.set_progress_bar_config(disable=True)
    return found


def drawn_by(theirs: Any, pipeline: Pipeline, guidance_scale: float, **options: Any) -> Tensor:
    found: Tensor = theirs(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=pipeline.initial_noise(SEEDS),
        output_type="pt",
        **options,
    ).images
    return found


# --- pictures


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_equal_those_of_diffusers(guidance_scale: float, folder: Path, pipeline: Pipeline) -> None:
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    expected = drawn_by(loaded_by_diffusers(folder), pipeline, guidance_scale)
    assert drawn.shape == (2, 3, *pipeline.picture_size) == (2, 3, 16, 16)
    assert_close(drawn, expected, rtol=0, atol=1e-4)  # the same operations: rounding only
    other = pipeline.draw(PROMPTS[::-1], SEEDS, STEPS, guidance_scale)
    assert (drawn - other).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_guidance_leads_away_from_the_given_prompt(folder: Path, pipeline: Pipeline) -> None:
    expected = drawn_by(loaded_by_diffusers(folder), pipeline, 4.0, negative_prompt=["a castle"] * 2)
    condition, negative = pipeline.encode(PROMPTS), pipeline.encode(["a castle"])
    latents = pipeline.draw_latents(condition, SEEDS, STEPS, 4.0, negative)
    assert_close(pipeline.decode(latents), expected, rtol=0, atol=1e-4)
    assert (expected - pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [0.34, 0.7, 1.0])
def test_image_to_image_equals_that_of_diffusers(strength: float, folder: Path, pipeline: Pipeline) -> None:
    kind = "StableDiffusionXLImg2ImgPipeline" if is_sdxl(folder) else "StableDiffusion3Img2ImgPipeline"
    own = loaded_by_diffusers(folder)
    theirs = getattr(diffusers, kind)(**own.components)
    theirs.set_progress_bar_config(disable=True)
    latents = pipeline.initial_noise([1, 2])
    drawn = image_to_image(pipeline, pipeline.encode(PROMPTS).detach(), latents, SEEDS, STEPS, 4.0, strength)
    expected = theirs(
        PROMPTS,
        image=latents,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **({} if is_sdxl(folder) else {"height": 16, "width": 16}),
    ).images
    assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (drawn - latents).abs().max() > 1e-2


def test_a_chain_goes_on_from_a_step(pipeline: Pipeline) -> None:
    condition, noise = pipeline.encode(PROMPTS).detach(), pipeline.initial_noise(SEEDS)
    conditions = pipeline.guided(condition, 4.0)
    steps = list(pipeline.chain(conditions, noise, STEPS, 4.0))
    again = list(pipeline.chain(conditions, steps[0].latents, STEPS, 4.0, start=1))
    assert_close(again[-1].latents, steps[-1].latents, rtol=0, atol=1e-5)
    *_, stopped = pipeline.chain(conditions, noise, STEPS, 4.0, stop=2)
    assert torch.equal(stopped.model_input, steps[2].model_input)
    assert torch.equal(pipeline.sample(condition, noise, STEPS, 4.0).detach(), steps[-1].latents)


def test_a_prediction_is_the_one_of_the_chain_and_takes_other_weights(pipeline: Pipeline) -> None:
    condition, noise = pipeline.encode(PROMPTS).detach(), pipeline.initial_noise(SEEDS)
    step = next(iter(pipeline.chain([condition], noise, STEPS, 1.0)))
    with torch.no_grad():
        predicted = pipeline.predict(step.model_input, step.timestep.expand(2), condition)
        assert_close(predicted, step.noise_preds[0], rtol=0, atol=1e-5)
        own = dict(pipeline.denoiser.named_parameters())
        name = next(name for name in own if name.endswith((".attn2.to_v.weight", "context_embedder.weight")))
        other = pipeline.predict(step.model_input, step.timestep, condition, {name: -own[name]})
    assert (other - predicted).abs().max() > 1e-3


def test_the_autoencoder_is_used_as_in_diffusers(folder: Path, pipeline: Pipeline) -> None:
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vae: Any = pipeline.parts["vae"]
    shift = vae.config.shift_factor or 0.0
    assert bool(shift) is not is_sdxl(folder)
    expected = (vae.encode(pictures * 2 - 1).latent_dist.mode() - shift) * vae.config.scaling_factor
    latents = pipeline.encode_pictures(pictures)
    assert latents.shape == (2, *pipeline.latent_shape)
    assert_close(latents, expected, rtol=0, atol=1e-6)
    decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample / 2 + 0.5
    assert_close(pipeline.decode(latents), decoded.clamp(0, 1), rtol=0, atol=1e-6)


# --- files


def test_what_is_saved_draws_the_same_in_diffusers(pipeline: Pipeline, tmp_path: Path) -> None:
    before = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    edited = [name for name in pipeline.named_parameters() if name.endswith("layers.1.mlp.fc2.weight")]
    assert len(edited) == 2
    with torch.no_grad():
        for name in edited:
            pipeline.linear(name).weight.mul_(-1)
    pipeline.save(tmp_path / "saved")
    drawn = pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0)
    assert_close(drawn_by(loaded_by_diffusers(tmp_path / "saved"), pipeline, 4.0), drawn, rtol=0, atol=1e-4)
    assert (drawn - before).abs().max() > 1e-3
    again = load_pipeline(str(tmp_path / "saved"))
    for name, parameter in pipeline.named_parameters().items():
        assert torch.equal(again.named_parameters()[name], parameter), name
    assert again.settings() == pipeline.settings()


def test_the_files_are_the_loaded_weights(folder: Path, pipeline: Pipeline) -> None:
    base = BaseModel.find(str(folder))
    assert base.family is type(pipeline)
    assert set(base.names) == set(pipeline.named_parameters())
    assert base.sha256(torch.float32) == WholeModel.loaded(pipeline).sha256()
    assert base.reader is not None and base.reader.ids(PROMPTS) == pipeline.reader.ids(PROMPTS)
    assert base.reader.parts == tuple(text.part for text in pipeline.texts)
    base.check_steps(STEPS, "steps")


def test_half_precision_files_load(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for file in copy.glob("*/*.safetensors"):
        halves = {name: value.half() for name, value in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    names = check_model(str(copy))
    assert sum(map(len, names.values())) == len(pipeline.named_parameters())
    halved = load_pipeline(str(copy))
    for name, value in pipeline.named_parameters().items():
        assert torch.equal(halved.named_parameters()[name], value.half().float()), name
    theirs = loaded_by_diffusers(copy, variant="fp16")
    assert_close(halved.draw(PROMPTS, SEEDS, STEPS, 4.0), drawn_by(theirs, halved, 4.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_part_is_named(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    family = BaseModel.find(str(folder)).family
    for part, declared in family.declared.items():
        if (folder / part).is_dir():
            copy = tmp_path / part
            shutil.copytree(folder, copy)
            shutil.rmtree(copy / part)
            with pytest.raises(ValueError, match=rf"lacks {part}: a {family.index_class} has tokenizer, ") as caught:
                check_model(str(copy))
            needed = str(caught.value).partition(" has ")[2].rstrip(".").split(", ")
            assert (part in needed) is not declared.optional


# --- text


def test_a_cut_prompt_is_warned_of_for_each_encoder(pipeline: Pipeline, folder: Path) -> None:
    prompt = " ".join(f"{folder.name} dog" for _ in range(300))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = pipeline.tokenize([prompt])
        pipeline.tokenize([prompt])
    said = [str(warning.message) for warning in caught if "ignores the rest" in str(warning.message)]
    assert len(said) == len(pipeline.texts) == len(tokens.ids)
    for text, ids, line in zip(pipeline.texts, tokens.ids, said, strict=True):
        who = "the text encoder" if text.part == "text_encoder" else text.part
        assert f"tokens; {who} reads {text.length} and" in line
        assert ids.shape == (1, text.length)


def test_where_text_encoders_are_read_is_declared(pipeline: Pipeline) -> None:
    names = list(pipeline.named_parameters())
    for text in pipeline.texts:
        declared = pipeline.read_after[text.part]
        assert declared["tokens"] == (-1 if text.layer is None else text.layer)
        layers = sorted(
            {layer_index(name) for name in names if re.search(rf"^{text.part}[.].*(layers|block)[.]", name)}
        )
        dead = {layer_index(name) for name in pipeline.unread(names) if name.startswith(f"{text.part}.encoder.layers.")}
        assert dead == set(layers[len(layers) + max(declared.values()) + 1 :])


def test_learned_tokens_are_new_in_every_encoder(pipeline: Pipeline) -> None:
    tokens, words = pipeline.tokenize_templates(["a {} at sunset"], 1), ["a dog at sunset"]
    own = pipeline.initial_embeddings(1, "dog", torch.Generator()).requires_grad_()
    assert own.shape == (1, sum(pipeline.token_widths))
    with torch.no_grad():
        expected = pipeline.encode(words)
    found = pipeline.encode(tokens, own)
    assert found.pooled is not None and expected.pooled is not None
    assert_close(found.states, expected.states, rtol=0, atol=1e-4)
    assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.states.square().sum() + found.pooled.square().sum(), [own])
    assert all(part.abs().max() > 0 for part in gradient.split(pipeline.token_widths, dim=1))


def test_words_are_searched_that_all_encoders_read_as_one_token(pipeline: Pipeline) -> None:
    words = pipeline.whole_words(lambda word: word == "cat", ["soccer ball"])
    assert words.shape[1] == len(pipeline.texts) and len(words) > 100
    chosen = words[[3, 50, 90]]
    prompt = pipeline.words_of(chosen)
    for number, text in enumerate(pipeline.texts):
        assert text.words(prompt) == chosen[:, number].tolist()
        assert not set(words[:, number].tolist()) & set(text.words("cat soccer ball"))
    tokens = pipeline.tokenize_templates(["{} at sunset"], 3)
    weights = torch.zeros(3, len(words))
    weights[[0, 1, 2], [3, 50, 90]] = 1
    with torch.no_grad():
        found, expected = pipeline.encode_mixtures(weights, words, tokens), pipeline.encode([f"{prompt} at sunset"])
    assert_close(found.states, expected.states, rtol=0, atol=1e-4)


def test_streams_and_learned_tokens_of_each_encoder(pipeline: Pipeline) -> None:
    learned = pipeline.tokenize_templates(["a {} dog", "{}"], 2)
    assert [int((slots >= 0).sum()) for slots in learned.slots] == [4] * len(pipeline.texts)
    for text, ids, slots in zip(pipeline.texts, learned.ids, learned.slots, strict=True):
        table = text.table.detach()
        placed = ids.clone()
        placed[slots == 0], placed[slots == 1] = 7, 9
        embeddings = table[[7, 9]].clone().requires_grad_(True)
        with text.learned(embeddings, slots):
            states = text.states(ids)
        assert_close(states, text.states(placed), rtol=0, atol=1e-5)
        assert (states - text.states(ids)).abs().max() > 1e-3
        assert torch.autograd.grad(states.square().sum(), embeddings)[0].abs().max() > 0
        stream = text.stream(placed)
        assert_close(text.stream(placed, 0), text.stream(placed, -text_layers(text.model)), rtol=0, atol=0)
        if text.layer is not None:  # of a CLIP: what is read, as it is
            assert_close(stream, text.states(placed), rtol=0, atol=0)
        else:  # of a T5: before the norm
            assert_close(text.model.encoder.final_layer_norm(stream), text.states(placed), rtol=0, atol=1e-5)


def test_the_inputs_of_the_first_maps_are_what_they_read(pipeline: Pipeline) -> None:
    names = match_parameters("context", pipeline.named_parameters())
    condition = pipeline.encode(PROMPTS).detach()
    with capture_inputs(pipeline.sites(names)) as seen, torch.no_grad():
        pipeline.predict(pipeline.initial_noise(SEEDS), torch.tensor(500), condition)
    inputs = pipeline.first_inputs(condition)
    for name in names:
        way = way_of(name)
        assert way is not None
        read, found = seen[name], inputs[way].squeeze(1) if way == "pooled" else inputs[way]
        assert_close(found, read[:, : found.shape[1]], rtol=0, atol=1e-5)
        assert not read[:, found.shape[1] :].any()  # zeros in place of a T5
    assert {way_of(name) for name in names} == set(inputs) == {"tokens", "pooled"}
    positions = sum(pipeline.texts[number].length for number in pipeline.token_order)
    assert (
        positions + 256 * ("text_encoder_3" in type(pipeline).declared and len(pipeline.texts) == 2)
        == (condition.states.shape[1])
    )


def text_layers(model: Any) -> int:
    config = model.config
    return int(config.num_layers if config.model_type == "t5" else config.num_hidden_layers)


def test_every_family_has_its_own_class_in_diffusers() -> None:
    for name, family in FAMILIES.items():
        assert family.index_class == name and hasattr(diffusers, name)
        assert family.denoiser_part in family.declared and family.declared[family.denoiser_part].has_weights
