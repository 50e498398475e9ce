from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy, sample_latents
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import ForwardCount, count_forwards, decode_latents, initial_noise

PROMPTS = ["a dog", "an owl at sunset", "a castle in the rain", "a glossy apple", ""]
SEEDS = [3, 1, 4, 1, 5]


def sample(components: StableDiffusion, order: list[int], steps: int = 3, guidance_scale: float = 4.0) -> Tensor:
    """Pictures of ``PROMPTS`` with ``SEEDS``, those in ``order`` as one batch."""
    latents = sample_latents(
        components.unet,
        components.scheduler,
        encode_prompts(components.tokenizer, components.text_encoder, [PROMPTS[i] for i in order]),
        encode_prompts(components.tokenizer, components.text_encoder, [""]),
        initial_noise(components.unet, [SEEDS[i] for i in order]),
        steps,
        guidance_scale,
    )
    return decode_latents(components.vae, latents)


def test_noise_belongs_to_the_seed(components: StableDiffusion) -> None:
    state = torch.get_rng_state()
    noise = initial_noise(components.unet, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.shape == (5, 4, 8, 8)
    assert torch.equal(noise[[1]], initial_noise(components.unet, [1]))
    assert torch.equal(noise[1], noise[3])
    assert (noise[0] - noise[1]).abs().max() > 0.1
    many = initial_noise(components.unet, range(400))
    # 100k standard normal numbers: mean and deviation are known to about 0.003.
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


def test_pictures_do_not_depend_on_batch_size_or_order(components: StableDiffusion) -> None:
    together = sample(components, [0, 1, 2, 3, 4])
    assert together.shape == (5, 3, 16, 16)
    one_by_one = torch.cat([sample(components, [i]) for i in range(5)])
    threes = torch.cat([sample(components, [0, 1, 2]), sample(components, [3, 4])])
    reverse = sample(components, [4, 3, 2, 1, 0]).flip(0)
    for other in (one_by_one, threes, reverse):
        # Convolutions of other batch sizes round differently; a picture has 256 grey levels.
        assert_close(other, together, rtol=0, atol=1 / 255)
    # Pictures of the same seed with other prompts differ by more than that, so the test can fail.
    assert (together[1] - together[3]).abs().max() > 4 / 255


def test_pictures_are_in_range_and_on_the_cpu(components: StableDiffusion) -> None:
    vae, latents = components.vae, initial_noise(components.unet, [0, 1])
    vae.decoder.conv_out.weight.mul_(20)
    raw = vae.decode(latents / vae.config.scaling_factor).sample
    assert raw.min() < -1
    assert raw.max() > 1
    pictures = decode_latents(vae, latents)
    assert (pictures.dtype, pictures.device.type) == (torch.float32, "cpu")
    # Black is -1 for the autoencoder and 0 in a picture.
    assert_close(pictures, ((raw + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


def test_half_precision_pictures_are_float32(tiny_sd: Path) -> None:
    pictures = sample(load_copy(str(tiny_sd), torch.bfloat16), [0, 1], steps=1)
    assert pictures.dtype == torch.float32
    assert pictures.isfinite().all()


def test_sampling_leaves_no_trace_in_the_scheduler(components: StableDiffusion) -> None:
    first = sample(components, [0, 1])
    sample(components, [2], steps=5)
    assert torch.equal(sample(components, [0, 1]), first)
    assert len(components.scheduler.timesteps) == 1000  # nobody has set other timesteps


def test_forwards_are_counted_per_picture_and_guidance_doubles_them(components: StableDiffusion) -> None:
    with count_forwards(components.unet) as guided:
        sample(components, [0, 1, 2], steps=2)
    with count_forwards(components.unet) as unguided:
        sample(components, [0, 1, 2], steps=2, guidance_scale=1.0)
    assert (guided.count, unguided.count) == (2 * 2 * 3, 2 * 3)


def test_counts_go_on_and_stop_with_the_block(components: StableDiffusion) -> None:
    counter = ForwardCount()
    for _ in range(2):
        with count_forwards(components.unet, counter) as forwards:
            assert forwards is counter
            sample(components, [0], steps=1)
    sample(components, [0], steps=1)
    assert counter.count == 2 * 2
    with pytest.raises(RuntimeError, match="on purpose"), count_forwards(components.unet):
        raise RuntimeError("on purpose")
    assert not components.unet._forward_pre_hooks


def test_guidance_of_one_is_the_prompt_alone(components: StableDiffusion) -> None:
    states = encode_prompts(components.tokenizer, components.text_encoder, ["a dog"])
    noise = initial_noise(components.unet, [0])
    alone = sample_latents(components.unet, components.scheduler, states, torch.full_like(states, 9.0), noise, 2, 1.0)
    guided = sample_latents(components.unet, components.scheduler, states, states, noise, 2, 3.0)
    # Guidance between a prompt and itself is the prompt; latents are of order 10.
    assert_close(guided, alone, rtol=1e-4, atol=1e-3)


SCHEDULERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_latents_equal_those_of_the_diffusers_pipeline(
    model: str, scheduler: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    components = load_copy(str(request.getfixturevalue(model)))
    components.scheduler = getattr(diffusers, scheduler).from_config(components.scheduler.config, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=components.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(components.unet, [7, 8])
    prompts = ["a dog at sunset", "an owl"]
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=guidance_scale, latents=noise.clone(), output_type="latent"
    ).images
    ours = sample_latents(
        components.unet,
        components.scheduler,
        encode_prompts(components.tokenizer, components.text_encoder, prompts),
        encode_prompts(components.tokenizer, components.text_encoder, [""]),
        noise,
        4,
        guidance_scale,
    )
    # The same operations in the same order: equal up to rounding relative to the largest latent.
    assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert (theirs - noise).abs().max() > 0.1
