"""The samplers of diffusers that a pipeline may have, their allowed settings, and the source of their noise."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
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
"""Samplers of Stable Diffusion's and PixArt's noise process; if their steps draw noise, it is from ``generator``."""

FLOW_SAMPLERS = ("FlowMatchEulerDiscreteScheduler",)
"""Samplers of flow matching, as Stable Diffusion 3 and FLUX use it."""

DRAW_NOISE = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
)
"""Samplers that draw noise in their steps with any settings."""

PREDICTIONS = ("epsilon", "v_prediction")
"""Supported predictions of the denoiser, by the names that schedulers use."""


def make_sampler(name: object, config: Mapping[str, Any], model: str, flow: bool = False) -> SchedulerMixin:
    """The sampler of a pipeline.

    Args:
        name: Name of its class in ``model_index.json``.
        config: Content of its ``scheduler_config.json``.
        model: The model's name, which begins the messages.
        flow: Whether the model is trained with flow matching.

    Raises:
        ValueError: The sampler is not one of ``SAMPLERS`` or ``FLOW_SAMPLERS``, or its settings are not supported.
    """
    import diffusers

    if name not in (FLOW_SAMPLERS if flow else SAMPLERS):
        why = "is not for models of flow matching" if flow else "is not for models that predict noise or velocity"
        if name in _BROWNIAN:
            why = "draws noise that is not a picture's own"
        if not isinstance(name, str) or not hasattr(diffusers, name):
            why = "is not in diffusers"
        raise ValueError(
            f"model={model!r} has the scheduler {name!r:.100}, which {why}: put the files of another into scheduler/ "
            "and its name into model_index.json, such as those of "
            f"{FLOW_SAMPLERS[0] if flow else 'DPMSolverMultistepScheduler'}."
        )
    kind = getattr(diffusers, str(name))
    if missing := [backend for backend in getattr(kind, "_backends", ()) if find_spec(backend) is None]:
        raise ValueError(
            f"model={model!r} has the scheduler {name!r}, which needs {' and '.join(missing)}: install it with pip."
        )
    (_check_flow if flow else _check_settings)(config, model)
    try:
        return kind.from_config(config)  # type: ignore[no-any-return]
    except (ImportError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model={model!r}: its scheduler, {name}, cannot be made: {reason:.300}") from error


def _check_settings(config: Mapping[str, Any], model: str) -> None:
    """Check the settings of one of ``SAMPLERS``."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"model={model!r} has prediction_type={prediction!r:.100} in scheduler/scheduler_config.json: only models "
            f"that predict {' or '.join(PREDICTIONS)} can be used."
        )
    if str(config.get("variance_type") or "").startswith("learned") or config.get("use_flow_sigmas"):
        field = "use_flow_sigmas" if config.get("use_flow_sigmas") else "variance_type"
        raise ValueError(
            f"model={model!r} has {field}={config[field]!r} in scheduler/scheduler_config.json, which the "
            "denoiser's predictions do not fit: remove it."
        )


def _check_flow(config: Mapping[str, Any], model: str) -> None:
    """Check the settings of one of ``FLOW_SAMPLERS``."""
    for field in ("stochastic_sampling", "invert_sigmas"):
        if config.get(field):
            raise ValueError(
                f"model={model!r} has {field}={config[field]!r} in scheduler/scheduler_config.json, which Stable "
                "Diffusion 3 and FLUX do not draw with: remove it."
            )


_BROWNIAN = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the sampler's steps draw noise when it is called with ``step_options``."""
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    return type(scheduler).__name__ in DRAW_NOISE or algorithm.startswith("sde-")


def step_options(scheduler: SchedulerMixin, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Further arguments for ``scheduler.step``, the same as ``StableDiffusionPipeline`` passes.

    Args:
        scheduler: Any of ``SAMPLERS``.
        generators: One for each picture, for the noise of its steps; may be empty if the sampler draws no noise.

    Raises:
        ValueError: The sampler draws noise, and there are no generators.
    """
    if not generators and draws_noise(scheduler):
        raise ValueError(f"{type(scheduler).__name__} draws noise in its steps: give a generator for each picture.")
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
    if generators and "generator" in accepted:
        options["generator"] = list(generators)
    return options


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int, field: str, **arguments: Any) -> None:
    """Check by a run without a model that a sampler can take this number of steps and that the result is finite.

    Args:
        scheduler: Its configuration is used, its state is not.
        num_inference_steps: The number of steps.
        field: The argument that it comes from, for the message.
        **arguments: As for ``set_steps``.

    Raises:
        ValueError: The sampler cannot take this number of steps, or the result is not finite.
    """
    name = type(scheduler).__name__
    try:
        latents = _dry_run(scheduler, num_inference_steps, arguments)
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


def _dry_run(scheduler: SchedulerMixin, num_inference_steps: int, arguments: Mapping[str, Any]) -> Tensor:
    """Latents (1, 1, 1, 2) after all steps with a denoiser whose output is 0."""
    sampler, generator = set_steps(scheduler, num_inference_steps, "cpu", **arguments), torch.Generator()
    options = step_options(sampler, [generator])
    latents = torch.randn(1, 1, 1, 2, generator=generator) * start_scale(sampler)
    for timestep in sampler.timesteps:
        scaled = scaled_input(sampler, latents, timestep)
        latents = sampler.step(torch.zeros_like(scaled), timestep, latents, **options).prev_sample
    return latents


def scaled_input(sampler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """``latents`` as the denoiser reads them at ``timestep``; samplers of flow matching do not scale them."""
    scale = getattr(sampler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def start_scale(sampler: SchedulerMixin) -> Any:
    """Standard deviation of the noise that a chain begins with, a number or (); 1 for flow matching."""
    return getattr(sampler, "init_noise_sigma", 1.0)


def set_steps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> SchedulerMixin:
    """A fresh copy of ``scheduler``, ready for the first of ``num_inference_steps`` steps.

    Args:
        scheduler: Its configuration is used, its state is not.
        num_inference_steps: The number of steps.
        device: Device of the timesteps.
        **arguments: Further arguments of its ``set_timesteps``, from ``Flow.step_arguments``.
    """
    # ``from_config`` would use the class's defaults for fields that the file left out and that were corrected later.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    made = type(scheduler), num_inference_steps, str(device), repr(config), repr(arguments)
    ready = _READY.get(made)
    if ready is None:
        with torch.inference_mode(False):
            ready = type(scheduler).from_config(config)  # type: ignore[attr-defined]
            ready.set_timesteps(num_inference_steps, device=device, **arguments)
        _READY.clear()  # one chain's sampler is kept: drawing asks for the same one for every batch
        _READY[made] = ready
    return copy.deepcopy(ready)


_READY: dict[tuple[Any, ...], Any] = {}
"""The sampler that was last made by ``set_steps``, which nothing steps."""
