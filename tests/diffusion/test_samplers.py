"""Every scheduler of diffusers: its noise is a picture's own and its pictures are diffusers', or it is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.samplers import DRAW_NOISE, SAMPLERS, check_steps, draws_noise, make_sampler
from lit_unlearn.diffusion.trajectories import sample_chains, sample_state

ALL = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
"""Every scheduler of diffusers, those that need a library which is not there included."""
MISSING = [name for name in SAMPLERS if hasattr(getattr(diffusers, name), "_backends")]
STEPS, GUIDANCE = 4, 4.0
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
SETTINGS: list[dict[str, Any]] = [
    *({"_class_name": name} for name in SAMPLERS if name not in MISSING),
    *(
        {"_class_name": name, "algorithm_type": algorithm, **more}
        for name, more in (
            ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
            ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
            ("DPMSolverSinglestepScheduler", {}),
        )
        for algorithm in ("sde-dpmsolver++", "dpmsolver++")
    ),
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"_class_name": "SASolverScheduler", "algorithm_type": "noise_prediction"},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "timestep_spacing": "trailing"},
    {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "LCMScheduler", "original_inference_steps": 20},
]
"""Every scheduler that is accepted as it comes, and more settings of some: what they do may depend on them."""


def named(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def with_scheduler(settings: dict[str, Any]) -> Callable[[Path], object]:
    """What writes that scheduler into a model's folder."""

    def write(folder: Path) -> None:
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**CONFIG, **settings}), encoding="utf-8")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["scheduler"] = ["diffusers", settings["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    return write


@pytest.fixture
def drawing(request: pytest.FixtureRequest, components: StableDiffusion) -> StableDiffusion:
    components.scheduler = make_sampler(request.param["_class_name"], {**CONFIG, **request.param}, "tiny")
    return components


pytestmark = pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver and sde-dpmsolver:FutureWarning")
every_setting = pytest.mark.parametrize(
    "drawing",
    # Every scheduler as it comes is quick; its other settings are for the slow tests.
    [settings if len(settings) == 1 else pytest.param(settings, marks=pytest.mark.slow) for settings in SETTINGS],
    ids=named,
    indirect=True,
)


@pytest.fixture
def noise_of_steps(drawing: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise that the steps draw, as they draw it."""
    module = sys.modules[type(drawing.scheduler).__module__]
    found: list[Tensor] = []
    if original := getattr(module, "randn_tensor", None):

        def recorded(*args: Any, **options: Any) -> Tensor:
            found.append(original(*args, **options))
            return found[-1]

        monkeypatch.setattr(module, "randn_tensor", recorded)
    return found


def drawn(pipeline: StableDiffusion, seeds: Sequence[int], batch_size: int) -> Tensor:
    """Pictures (B, 3, H, W) of prompts that depend on the seed, so many at once."""
    prompts = [("a dog at sunset", "an owl", "")[seed % 3] for seed in seeds]
    parts = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    return torch.cat([pipeline.draw(prompts[part], seeds[part], STEPS, 1.0) for part in parts])


@every_setting
def test_a_picture_does_not_depend_on_those_that_are_drawn_with_it(
    drawing: StableDiffusion, noise_of_steps: list[Tensor]
) -> None:
    seeds = list(range(40))
    state = torch.get_rng_state()
    together = drawn(drawing, seeds, 40)
    noise = list(noise_of_steps)
    assert all(len(each) == 40 for each in noise)
    assert bool(noise) == draws_noise(drawing.scheduler)
    for size, last in ((1, 4), (3, 6)):  # numbers of pictures, the last group of which is in the middle of the 40
        noise_of_steps.clear()
        # Kernels of other batch sizes round differently; a picture has 256 grey levels.
        assert_close(drawn(drawing, seeds[:last], size), together[:last], rtol=0, atol=1 / 255)
        groups = [slice(start, start + size) for start in range(0, last, size)]
        assert len(noise_of_steps) == len(noise) * len(groups)
        for number, each in enumerate(noise_of_steps):
            group, step = divmod(number, len(noise) or 1)
            assert torch.equal(each, noise[step][groups[group]])
    assert torch.equal(torch.get_rng_state(), state)  # nothing came from the process
    for step in noise:
        assert len({float(each.flatten()[0]) for each in step}) == 40  # nor have two pictures the same
    assert (together[0] - together[3]).abs().max() > 4 / 255


@every_setting
def test_pictures_are_those_of_diffusers_from_the_same_generators(drawing: StableDiffusion) -> None:
    theirs = StableDiffusionPipeline(
        vae=drawing.vae,
        text_encoder=drawing.text_encoder,
        tokenizer=drawing.tokenizer,
        unet=drawing.unet,
        scheduler=drawing.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    prompts, seeds = ["a dog at sunset", "an owl"], [11, 5]
    for guidance_scale in (GUIDANCE, 1.0):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "output_type": "latent"}
        expected = theirs(prompts, generator=generators, **options).images
        found = drawing.draw_latents(drawing.encode(prompts), seeds, STEPS, guidance_scale)
        # The same operations in the same order: equal up to rounding relative to the largest latent.
        assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_what_diffusers_corrects_in_a_configuration_of_2022_holds_for_us(
    name: str, components: StableDiffusion
) -> None:
    incomplete = {key: value for key, value in CONFIG.items() if key not in ("clip_sample", "steps_offset")}
    components.scheduler = make_sampler(name, incomplete, "tiny")
    before = components.draw_latents(components.encode(["a dog"]), [3], STEPS, GUIDANCE)
    theirs = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=components.scheduler,  # it changes the configuration
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    expected = theirs("a dog", generator=generator, **options).images
    found = components.draw_latents(components.encode(["a dog"]), [3], STEPS, GUIDANCE)
    assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(before, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@every_setting
def test_states_of_a_chain_are_the_same_when_it_is_stopped(drawing: StableDiffusion) -> None:
    conditions = [drawing.encode([text] * 3) for text in ("", "a dog")]
    chains = sample_chains(drawing, conditions, *start(drawing, [3, 4, 5]))
    timesteps = drawing.noise.timesteps(STEPS)
    assert chains.shape[:2] == (3, len(timesteps))
    for stop in (0, 1, len(timesteps) - 1):
        alone = [condition[[1]] for condition in conditions]
        noise, steps, scale, generators = start(drawing, [4])
        state, timestep = sample_state(drawing, alone, noise, steps, scale, stop, generators)
        assert torch.equal(timestep, timesteps[stop])
        # Kernels of other batch sizes round differently.
        assert_close(state[0], chains[1, stop, 0], rtol=0, atol=1e-4 * float(chains[1, stop, 0].abs().max()))
    if draws_noise(drawing.scheduler):
        noise, steps, scale, _ = start(drawing, [4])
        with pytest.raises(ValueError, match="draws noise in its steps: give a generator for each picture"):
            sample_state(drawing, alone, noise, steps, scale, 0)


def start(pipeline: StableDiffusion, seeds: list[int]) -> tuple[Tensor, int, float, list[torch.Generator]]:
    noise, generators = pipeline.start_chains(seeds)
    return noise, STEPS, GUIDANCE, generators


# --- which ones


@pytest.mark.parametrize("name", ALL)
def test_a_scheduler_is_tested_here_or_refused_by_name_before_weights_are_read(
    name: str, broken_model: Callable[..., Path]
) -> None:
    if name in SAMPLERS and name not in MISSING:
        assert {"_class_name": name} in SETTINGS
        return
    folder = broken_model(with_scheduler({"_class_name": name}))
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"not read")
    with pytest.raises(ValueError, match=name):
        check_model(str(folder))


def test_all_that_is_accepted_is_in_diffusers() -> None:
    assert set(DRAW_NOISE) < set(SAMPLERS) < set(ALL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"_class_name": "DPMSolverSDEScheduler"}, "draws noise that is not a picture's own: put the files"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is not for models that predict noise or velocity: put"),
        ({"_class_name": "SchedulerMixin"}, "is not for models that predict noise or velocity"),
        ({"_class_name": "NoScheduler"}, "'NoScheduler', which is not in diffusers"),
        ({"_class_name": None}, "lacks scheduler"),
        ({"_class_name": ["DDIMScheduler"]}, r"\['DDIMScheduler'\], which is not in diffusers"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "has prediction_type='sample'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type='learned_range'.*remove"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "curly"}, "DDIMScheduler, cannot be made: curly"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}, "DDIMScheduler, cannot be made"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_weights_are_read(
    settings: dict[str, Any], sentence: str, broken_model: Callable[..., Path]
) -> None:
    folder = broken_model(with_scheduler(settings))
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=rf"^model='{folder}'.*{sentence}"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '"DDIMScheduler"'])
def test_a_configuration_that_is_none_is_refused(content: str, broken_model: Callable[..., Path]) -> None:
    def damage(folder: Path) -> None:
        (folder / "scheduler/scheduler_config.json").write_text(content, encoding="utf-8")

    with pytest.raises(ValueError, match=r"scheduler_config\.json (is not|has no mapping)"):
        check_model(str(broken_model(damage)))


# --- how many steps


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("PNDMScheduler", (4, 15, 50), (1, 2, 3)),
        ("LCMScheduler", (1, 15, 50), (51, 1001)),
        ("TCDScheduler", (1, 15, 50), (51, 1001)),
        ("DDIMScheduler", (1, 500), (1000, 1001)),  # the first of 1000 steps would be at 1000, with an offset of 1
        ("DPMSolverSinglestepScheduler", (1, 2, 15), ()),
        ("EulerDiscreteScheduler", (1, 15, 1000), ()),
    ],
)
def test_steps_that_a_sampler_cannot_take_are_refused(name: str, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    scheduler = make_sampler(name, CONFIG, "tiny")
    for steps in good:
        check_steps(scheduler, steps, "num_inference_steps")
    for steps in bad:
        with pytest.raises(
            ValueError, match=rf"^num_inference_steps={steps} cannot be used with the model's {name} \("
        ):
            check_steps(scheduler, steps, "num_inference_steps")


def test_settings_that_lead_to_no_numbers_are_refused() -> None:
    # The last timestep has no signal, from which the noise that is predicted cannot tell the picture.
    no_signal = {**CONFIG, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    trailing = {**no_signal, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match=r"^steps=4 of the model's DDIMScheduler lead to numbers that are not finite"):
        check_steps(make_sampler("DDIMScheduler", trailing, "tiny"), 4, "steps")
    check_steps(make_sampler("DDIMScheduler", {**trailing, "prediction_type": "v_prediction"}, "tiny"), 4, "steps")


def test_steps_are_checked_without_a_pipeline(broken_model: Callable[..., Path]) -> None:
    base = BaseModel.find(str(broken_model(with_scheduler({"_class_name": "LCMScheduler"}))))
    base.check_steps(50, "model.num_chain_steps")
    with pytest.raises(ValueError, match=r"^model\.num_chain_steps=60 cannot be used with the model's LCMScheduler"):
        base.check_steps(60, "model.num_chain_steps")
    base.check_steps(60, "model.num_chain_steps", "ddim")


def test_noise_to_start_from_is_float32_whatever_the_default(components: StableDiffusion) -> None:
    expected = components.initial_noise([3])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(components.initial_noise([3]), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert components.initial_noise([3]).dtype == torch.float32
