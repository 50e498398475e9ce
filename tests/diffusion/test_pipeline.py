"""A pipeline as methods, attacks and judges talk to it: the same numbers as its parts give, called by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import FF, KV, LAYERS, load_copy
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.image_to_image import image_to_image
from lit_unlearn.diffusion.prompts import ENCODE_BATCH, encode_prompts
from lit_unlearn.diffusion.sampling import count_forwards
from lit_unlearn.diffusion.text import TextEncoder, Tokens

PROMPTS, SEEDS, STEPS = ["a dog at sunset", "an owl"], [11, 5], 3


@pytest.fixture(params=["tiny_sd", "tiny_sd2"])
def any_pipeline(request: pytest.FixtureRequest) -> StableDiffusion:
    return load_copy(str(request.getfixturevalue(request.param)))


def states(pipeline: StableDiffusion, prompts: list[str]) -> Tensor:
    return encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts)


def asked(count: int = 2) -> tuple[Tensor, Tensor]:
    """Noised latents and their timesteps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randint(1000, (count,), generator=generator)


# --- parts and weights


def test_parts_are_the_modules_and_weights_have_their_names(components: StableDiffusion) -> None:
    names = ("text_encoder", "unet", "vae")
    assert components.parts == {name: getattr(components, name) for name in names}
    assert components.denoiser is components.unet
    assert (components.device, components.dtype) == (torch.device("cpu"), torch.float32)
    named = components.named_parameters()
    assert len(named) == sum(len(list(part.parameters())) for part in components.parts.values())
    assert named["unet.conv_in.weight"] is components.unet.conv_in.weight


def test_shapes_are_those_of_its_pictures(components: StableDiffusion) -> None:
    noise = components.initial_noise(SEEDS)
    pictures = components.decode(noise)
    assert components.latent_shape == tuple(noise.shape[1:]) == (4, 8, 8)
    assert components.picture_size == tuple(pictures.shape[-2:]) == (16, 16)
    assert components.encode_pictures(pictures).shape == noise.shape


def test_sites_are_the_layers_of_the_weights(components: StableDiffusion) -> None:
    names = [*KV[:2], FF[1], LAYERS[0]]
    sites = components.sites(names)
    assert list(sites) == names
    for name, layer in sites.items():
        assert isinstance(layer, nn.Linear)
        assert layer.weight is components.named_parameters()[name]


@pytest.mark.parametrize(
    "name",
    [
        "unet.conv_in.weight",
        "text_encoder.embeddings.token_embedding.weight",
        "text_encoder.final_layer_norm.weight",
        "text_encoder.encoder.layers.1.mlp.fc2.bias",
    ],
)
def test_what_is_no_linear_weight_is_no_site(name: str, components: StableDiffusion) -> None:
    assert name in components.named_parameters()
    with pytest.raises(ValueError, match=f"selects {name}, which is not the weight of a linear layer"):
        components.sites([LAYERS[0], name])


# --- prompts


def test_encode_is_the_text_encoder_by_hand(any_pipeline: StableDiffusion) -> None:
    expected = states(any_pipeline, PROMPTS)
    tokens = any_pipeline.tokenize(PROMPTS)
    for condition in (any_pipeline.encode(PROMPTS), any_pipeline.encode(tokens), any_pipeline.condition(tokens)):
        assert torch.equal(condition.states, expected)
        assert condition.pooled is None
    assert tokens.slots == ()
    assert len(any_pipeline.texts) == len(tokens.ids) == 1


def test_many_prompts_are_encoded_as_few_are(components: StableDiffusion) -> None:
    words = ["dog", "cat", "owl", "castle", "apple"]
    prompts = [f"{words[i % 5]} {words[i // 5 % 5]} {words[i // 25]}" for i in range(ENCODE_BATCH + 6)]
    sizes: list[int] = []
    handle = components.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    many = components.encode_many(prompts)
    assert sizes == [ENCODE_BATCH, 6]
    handle.remove()
    # Float32 in batches of another size.
    assert_close(many.states, components.encode(prompts).states, rtol=0, atol=1e-5)
    assert torch.equal(many.states, components.encode_many(components.tokenize(prompts)).states)
    few = prompts[:ENCODE_BATCH]
    assert torch.equal(components.encode_many(few).states, components.encode(few).states)
    assert (many.states[1:] - many.states[:-1]).abs().amax(dim=(1, 2)).min() > 1e-2


def test_learned_tokens_stand_where_the_templates_say(any_pipeline: StableDiffusion) -> None:
    tokens = any_pipeline.tokenize_templates(["a {} at sunset", "a cat"], 2)
    own = any_pipeline.initial_embeddings(2, "soccer ball", torch.Generator()).requires_grad_()
    condition = any_pipeline.encode(tokens, own)
    assert torch.equal(condition.states, states(any_pipeline, ["a soccer ball at sunset", "a cat"]))
    (gradient,) = torch.autograd.grad(condition.states[0].square().sum(), [own])
    assert gradient.abs().max() > 0
    # Without them it is another prompt, and nothing stays in the encoder.
    assert not torch.equal(any_pipeline.encode(tokens).states[0], condition.states[0])


# --- the denoiser


def test_a_prediction_is_the_denoiser_by_hand(any_pipeline: StableDiffusion) -> None:
    noisy, timesteps = asked()
    condition = any_pipeline.encode(PROMPTS)
    with torch.no_grad():
        expected = any_pipeline.unet(noisy, timesteps, encoder_hidden_states=condition.states).sample
        assert torch.equal(any_pipeline.predict(noisy, timesteps, condition), expected)
        one = any_pipeline.predict(noisy, timesteps[0], condition)
    assert torch.equal(one[0], expected[0])
    assert not torch.equal(one[1], expected[1])


@pytest.mark.parametrize("names", [KV, [*FF, "unet.conv_in.weight"]], ids=["attention", "feed forward"])
def test_values_stand_in_for_the_denoisers_own(names: list[str], components: StableDiffusion) -> None:
    noisy, timesteps = asked()
    condition = components.encode(PROMPTS)
    other = copy.deepcopy(components.unet)
    generator = torch.Generator().manual_seed(1)
    values = {}
    with torch.no_grad():
        for name in names:
            short = name.removeprefix("unet.")
            weight = dict(other.named_parameters())[short]
            weight.add_(weight.std() * torch.randn(weight.shape, generator=generator))
            values[short] = weight.detach().clone()
        expected = other(noisy, timesteps, condition.states).sample
        before = components.predict(noisy, timesteps, condition)
        assert torch.equal(components.predict(noisy, timesteps, condition, values), expected)
        assert (expected - before).abs().max() > 1e-3
        # The denoiser has its own again.
        assert torch.equal(components.predict(noisy, timesteps, condition), before)


def test_gradients_flow_through_values_and_conditions(components: StableDiffusion) -> None:
    noisy, timesteps = asked()
    value = components.unet.conv_in.weight.detach().clone().requires_grad_()
    condition = Condition(components.encode(PROMPTS).states.detach().requires_grad_())
    output = components.predict(noisy, timesteps, condition, {"conv_in.weight": value})
    gradients = torch.autograd.grad(output.square().sum(), [value, condition.states])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert components.unet.conv_in.weight.grad is None


# --- pictures


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_equal_those_of_the_diffusers_pipeline(any_pipeline: StableDiffusion, guidance_scale: float) -> None:
    theirs = StableDiffusionPipeline(
        vae=any_pipeline.vae,
        text_encoder=any_pipeline.text_encoder,
        tokenizer=any_pipeline.tokenizer,
        unet=any_pipeline.unet,
        scheduler=copy.deepcopy(any_pipeline.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=any_pipeline.initial_noise(SEEDS),
        output_type="pt",
    ).images
    drawn = any_pipeline.draw(PROMPTS, SEEDS, STEPS, guidance_scale)
    assert (drawn.dtype, drawn.device.type) == (torch.float32, "cpu")
    # The same operations: rounding only, far below one grey level in 255.
    assert_close(drawn, expected, rtol=0, atol=1e-4)
    other = any_pipeline.draw(PROMPTS[::-1], SEEDS, STEPS, guidance_scale)
    assert (drawn - other).abs().max() > 1e-2


def test_sampling_ends_where_the_chain_ends(any_pipeline: StableDiffusion) -> None:
    condition, empty = any_pipeline.encode(PROMPTS), any_pipeline.encode([""])
    noise = any_pipeline.initial_noise(SEEDS)
    *_, guided = any_pipeline.chain([empty.expand(2), condition], noise, STEPS, 4.0)
    *_, alone = any_pipeline.chain([condition], noise, STEPS, 1.0)
    latents = any_pipeline.draw_latents(condition, SEEDS, STEPS, 4.0)
    assert torch.equal(latents, guided.latents)
    assert torch.equal(any_pipeline.sample(condition, noise, STEPS, 4.0, empty).detach(), latents)
    assert torch.equal(any_pipeline.draw_latents(condition, SEEDS, STEPS, 1.0), alone.latents)
    assert (guided.latents - alone.latents).abs().max() > 1e-2
    assert torch.equal(any_pipeline.decode(latents), any_pipeline.draw(PROMPTS, SEEDS, STEPS, 4.0))


STRENGTHS = [(0.34, 4.0), (0.7, 1.0), (1.0, 4.0)]
SAMPLERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
SAMPLERS += ["EulerAncestralDiscreteScheduler"]  # draws noise in its steps


def theirs(pipeline: StableDiffusion, kind: type, sampler: str) -> Any:
    """A pipeline of diffusers with the same parts; ours gets the sampler too."""
    own = {"DDIMScheduler": {"steps_offset": 1}, "PNDMScheduler": {"steps_offset": 1, "skip_prk_steps": True}}
    options = {**pipeline.scheduler.config, "clip_sample": False, **own.get(sampler, {})}
    pipeline.scheduler = scheduler = getattr(diffusers, sampler).from_config(options)
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = kind(**parts, scheduler=copy.deepcopy(scheduler), **none)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("strength", "guidance_scale"), STRENGTHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_equals_that_of_diffusers(
    sampler: str, strength: float, guidance_scale: float, any_pipeline: StableDiffusion
) -> None:
    other = theirs(any_pipeline, diffusers.StableDiffusionImg2ImgPipeline, sampler)
    latents = asked()[0]
    condition = any_pipeline.encode(PROMPTS).detach()
    drawn = image_to_image(any_pipeline, condition, latents, SEEDS, STEPS, guidance_scale, strength)
    expected = other(
        PROMPTS,
        image=latents,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    # The same operations in the same order: rounding only, relative to the largest latent.
    assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (drawn - latents).abs().max() > 1e-2
    assert (drawn - any_pipeline.draw_latents(condition, SEEDS, STEPS, guidance_scale)).abs().max() > 1e-3


@pytest.mark.parametrize(("strength", "guidance_scale"), STRENGTHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_equals_that_of_diffusers(
    sampler: str, strength: float, guidance_scale: float, any_pipeline: StableDiffusion
) -> None:
    other = theirs(any_pipeline, diffusers.StableDiffusionInpaintPipeline, sampler)
    latents = asked()[0]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:7] = 1
    drawn = image_to_image(
        any_pipeline, any_pipeline.encode(PROMPTS).detach(), latents, SEEDS, STEPS, guidance_scale, strength, mask=mask
    )
    expected = other(
        PROMPTS,
        image=latents,
        mask_image=mask.repeat_interleave(2, -1).repeat_interleave(2, -2),
        masked_image_latents=latents,  # for models with further channels only
        height=16,
        width=16,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # as above
    assert torch.equal(drawn * (1 - mask), latents * (1 - mask))
    assert (drawn - latents).abs().max() > 1e-2


def test_guidance_leads_away_from_the_given_prompt(any_pipeline: StableDiffusion) -> None:
    expected = theirs(any_pipeline, StableDiffusionPipeline, "DPMSolverMultistepScheduler")(
        PROMPTS,
        negative_prompt=["a castle"] * 2,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=any_pipeline.initial_noise(SEEDS),
        output_type="latent",
    ).images
    condition, negative = any_pipeline.encode(PROMPTS), any_pipeline.encode(["a castle"])
    drawn = any_pipeline.draw_latents(condition, SEEDS, STEPS, 4.0, negative)
    assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # as above
    assert (drawn - any_pipeline.draw_latents(condition, SEEDS, STEPS, 4.0)).abs().max() > 1e-2
    assert len(any_pipeline.guided(condition, 1.0, negative)) == 1


def test_less_than_a_step_is_refused(components: StableDiffusion) -> None:
    with pytest.raises(ValueError, match=r"strength=0\.3 is less than one of 3 steps"):
        image_to_image(components, components.encode(PROMPTS), asked()[0], SEEDS, 3, 4.0, 0.3)


def test_a_chain_goes_on_from_a_step_with_other_conditions(any_pipeline: StableDiffusion) -> None:
    pipeline = any_pipeline.with_sampler("ddim")  # whose steps do not depend on earlier ones
    one, other = ([pipeline.encode([prompt]).detach()] for prompt in PROMPTS)
    noise = pipeline.initial_noise(SEEDS[:1])
    *_, stopped = pipeline.chain(one, noise, STEPS, 1.0, stop=1)
    *_, end = pipeline.chain(other, stopped.latents, STEPS, 1.0, start=1)
    seen: list[int] = []

    def change(number: int, latents: Tensor) -> Tensor:
        seen.append(number)
        return latents + number

    steps = list(pipeline.chain(lambda number: other if number else one, noise, STEPS, 1.0))
    assert torch.equal(steps[-1].latents, end.latents)
    *_, alone = pipeline.chain(one, noise, STEPS, 1.0)
    assert (alone.latents - end.latents).abs().max() > 1e-2
    changed = list(pipeline.chain(lambda number: other if number else one, noise, STEPS, 1.0, change=change))
    assert seen == [0, 1, 2]
    assert torch.equal(changed[0].latents, steps[0].latents)
    assert torch.equal(changed[1].latents, steps[1].latents + 1)


def test_no_guidance_costs_half(components: StableDiffusion) -> None:
    costs = []
    for scale in (4.0, 1.0):
        with count_forwards(components.denoiser) as forwards:
            components.draw(PROMPTS, SEEDS, STEPS, scale)
        costs.append((forwards.count, forwards.backward))
    steps = len(components.noise.timesteps(STEPS))
    assert costs == [(2 * 2 * steps, 0), (2 * steps, 0)]


def test_settings_are_what_acts_on_pictures_beside_the_weights(
    components: StableDiffusion, tiny_sd: Path, tiny_sd2: Path
) -> None:
    settings = components.settings()
    assert settings == load_copy(str(tiny_sd)).settings()
    other = load_copy(str(tiny_sd2)).settings()
    assert settings["text_encoder"]["hidden_act"] == "quick_gelu" != other["text_encoder"]["hidden_act"]
    assert settings["scheduler"] != other["scheduler"] != components.with_sampler("ddim").settings()["scheduler"]
    components.scheduler.register_to_config(_diffusers_version="0.0.1")
    assert components.settings() == settings


# --- a family with more than one text encoder


@dataclass(eq=False)
class Twofold(StableDiffusion):
    """Reads a prompt twice, the second time with an encoder whose mean is a pooled vector."""

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        (text,) = super().texts
        return text, TextEncoder("text_encoder", self.text_encoder, self.tokenizer)

    def condition(self, tokens: Tokens) -> Condition:
        first, second = (text.states(ids) for text, ids in zip(self.texts, tokens.ids, strict=True))
        return Condition(first, second.mean(dim=1))


@pytest.fixture
def twofold(components: StableDiffusion) -> Twofold:
    return Twofold(components.tokenizer, components.text_encoder, components.unet, components.vae, components.scheduler)


def test_every_text_encoder_reads_the_prompts_and_all_parts_travel(twofold: Twofold) -> None:
    tokens = twofold.tokenize(PROMPTS)
    assert [len(ids) for ids in tokens.ids] == [2, 2]
    learned = twofold.tokenize_templates(["a {}", "{} {}"], 2)
    assert [int((slots >= 0).sum()) for slots in learned.slots] == [6, 6]
    condition = twofold.encode(PROMPTS)
    assert condition.pooled is not None
    many = twofold.encode_many(PROMPTS * ENCODE_BATCH)
    assert many.pooled is not None
    assert many.pooled.shape == (2 * ENCODE_BATCH, 32)
    assert_close(many[-2:].pooled, condition.pooled, rtol=0, atol=1e-5)
    assert twofold.draw(PROMPTS, SEEDS, 1, 4.0).shape == (2, 3, 16, 16)
