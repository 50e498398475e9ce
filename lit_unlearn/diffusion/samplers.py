"""The samplers of diffusers that a pipeline may have, in which settings, and where their noise comes from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SAMPLERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Those with the noise process of Stable Diffusion, and with noise in their steps, if any, from ``generator``."""

DRAW_NOISE = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
)
"""Those that draw noise in their steps, whatever their settings."""

PREDICTIONS = ("epsilon", "v_prediction")
"""What the denoiser may be trained to say, as schedulers name it."""


def make_sampler(config: Mapping[str, Any], model: str) -> SchedulerMixin:
    """The sampler of a ``scheduler_config.json``.

    Args:
        config: The file's content.
        model: Whose it is, as the sentences begin.

    Raises:
        ValueError: The sampler is none of ``SAMPLERS``, or has settings that it cannot be used with.
    """
    import diffusers

    name = config.get("_class_name")
    if name not in SAMPLERS:
        why = "draws noise that is not a picture's own" if name in _BROWNIAN else "is not for Stable Diffusion 1 and 2"
        if not isinstance(name, str) or not hasattr(diffusers, name):
            why = "is not in diffusers"
        raise ValueError(
            f"model={model!r} has the scheduler {name!r:.100}, which {why}: name another in "
            "scheduler/scheduler_config.json, such as DPMSolverMultistepScheduler."
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"model={model!r} has prediction_type={prediction!r:.100} in scheduler/scheduler_config.json: only models "
            f"that predict {' or '.join(PREDICTIONS)} can be used."
        )
    if str(config.get("variance_type") or "").startswith("learned") or config.get("use_flow_sigmas"):
        field = "use_flow_sigmas" if config.get("use_flow_sigmas") else "variance_type"
        raise ValueError(
            f"model={model!r} has {field}={config[field]!r} in scheduler/scheduler_config.json, which is for other "
            "models than Stable Diffusion 1 and 2: remove it."
        )
    try:
        return getattr(diffusers, name).from_config(config)  # type: ignore[no-any-return]
    except (ImportError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model={model!r}: its scheduler, {name}, cannot be made: {reason:.300}") from error


_BROWNIAN = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether its steps draw noise, used as ``step_options`` has it."""
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    return type(scheduler).__name__ in DRAW_NOISE or algorithm.startswith("sde-")


def step_options(scheduler: SchedulerMixin, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What ``scheduler.step`` is given beside latents, as ``StableDiffusionPipeline`` gives it.

    Args:
        scheduler: Any of ``SAMPLERS``.
        generators: One for each picture, from which the noise of its steps is drawn; may be none where none is.

    Raises:
        ValueError: The sampler draws noise, and nothing says from what.
    """
    if not generators and draws_noise(scheduler):
        raise ValueError(f"{type(scheduler).__name__} draws noise in its steps: give a generator for each picture.")
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
    if generators and "generator" in accepted:
        options["generator"] = list(generators)
    return options


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int, field: str) -> None:
    """Check that a sampler can take so many steps, and that they lead to numbers, by taking them without a model.

    Args:
        scheduler: Its configuration is used, its state is not.
        num_inference_steps: The steps.
        field: The argument that they come from.

    Raises:
        ValueError: It cannot.
    """
    name = type(scheduler).__name__
    try:
        latents = _dry_run(scheduler, num_inference_steps)
    except (ValueError, IndexError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{field}={num_inference_steps} cannot be used with the model's {name} ({reason:.300}): give another."
        ) from error
    if not latents.isfinite().all():
        raise ValueError(
            f"{field}={num_inference_steps} of the model's {name} lead to numbers that are not finite, with the "
            "settings in scheduler/scheduler_config.json: correct these (rescale_betas_zero_snr is for velocity), or "
            "give another number."
        )


def _dry_run(scheduler: SchedulerMixin, num_inference_steps: int) -> Tensor:
    """Latents (1, 1, 1, 2) after all steps of a denoiser that says 0."""
    sampler, generator = set_steps(scheduler, num_inference_steps, "cpu"), torch.Generator()
    options = step_options(sampler, [generator])
    latents = torch.randn(1, 1, 1, 2, generator=generator) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, timestep)
        latents = sampler.step(torch.zeros_like(scaled), timestep, latents, **options).prev_sample
    return latents


def set_steps(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None = None
) -> SchedulerMixin:
    """A fresh copy of ``scheduler`` that is about to take its first of so many steps."""
    fresh = type(scheduler).from_config(scheduler.config)  # type: ignore[attr-defined]
    fresh.set_timesteps(num_inference_steps, device=device)
    return fresh  # type: ignore[no-any-return]
