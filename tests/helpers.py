"""What tests in several files share: weights at a moment, runs that end like a crash, names in the tiny pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTokenizer

from lit_unlearn.callbacks.closed_form import ClosedFormEdit
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.refined_null_space import RefinedNullSpace
from lit_unlearn.core.solvers import LeastSquares, RidgeMap
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.samplers import set_steps
from lit_unlearn.diffusion.single_file.names import Keys, Namer
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

CONFIGS = Path(__file__).parents[1] / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
"""Arguments of a fit on the CPU that shows nothing."""

LAYERS = [f"text_encoder.encoder.layers.{number}.mlp.fc2.weight" for number in (1, 2)]
"""What ``ValueRefinement`` edits in ``tiny_sd``, in order."""
BLOCKS = [
    f"unet.{block}.transformer_blocks.0."
    for block in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
]
"""The transformer blocks of ``tiny_sd``, in the order of the UNet's calls."""
KV = [f"{block}attn2.{name}.weight" for block in BLOCKS for name in ("to_k", "to_v")]
FF = [f"{block}ff.net.2.weight" for block in BLOCKS]

PROMPTS, TARGETS = ["a dog", "the dog at sunset"], ["a soccer ball", "the soccer ball at sunset"]
"""Edit and target prompts of the dog in the concept set ``pets``."""

SHARED = {"emoji-sd", "checkpoints/emoji-sd", str(CONFIGS.parent / "checkpoints/emoji-sd")}
"""Models that no test writes to; the session's fixtures add theirs."""

Module = TypeVar("Module", bound=DiffusionEditor)


# --- weights


def draw_weights(model: nn.Module, seed: int, gain: float) -> None:
    """Give layers random weights: normal, their spread ``gain`` over the root of the fan-in.

    What a library draws changes between its versions, with the number and order of its draws. These do not. Norms and
    scalars stay as they are: constants.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in sorted(model.named_modules()):
            drawn = [parameter for parameter in layer.parameters(recurse=False) if parameter.dim()]
            for parameter in () if "Norm" in type(layer).__name__ else drawn:
                fan_in = max(other[0].numel() for other in drawn)
                parameter.normal_(std=gain * fan_in**-0.5, generator=generator)


load_once = cache(load_pipeline)


def load_copy(model: str | Path, *options: Any) -> StableDiffusion:
    """As ``load_pipeline``, in less time: a copy of what was loaded once, if nothing writes to its folder."""
    model = str(model)
    if model not in SHARED:
        return load_pipeline(model, *options)
    loaded = load_once(model, *options)
    if not isinstance(loaded.tokenizer, CLIPTokenizer):
        return copy.deepcopy(loaded)
    # A copied tokenizer does not decode as the original.
    tokenizer = CLIPTokenizer.from_pretrained(resolve_model(model), subfolder="tokenizer")
    return replace(copy.deepcopy(replace(loaded, tokenizer=None)), tokenizer=tokenizer)  # type: ignore[arg-type]


def weights(source: DiffusionEditor | StableDiffusion) -> dict[str, Tensor]:
    """Copies of all weights of a pipeline by name, as they are now."""
    components = source if isinstance(source, StableDiffusion) else source.pipeline
    return {name: parameter.detach().clone() for name, parameter in components.named_parameters().items()}


def edit_content(
    folder: str | Path,
    change: Callable[[Tensor], Tensor],
    names: Sequence[str] = LAYERS,
    arguments: Mapping[str, Any] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Content of a checkpoint of an edit of ``dog`` in a model.

    Args:
        folder: Folder of the model.
        change: The new value of a weight, from its value in the model.
        names: The edited weights.
        arguments: Arguments of the method besides ``dtype``.
        **facts: Further provenance, or other one.
    """
    parameters = load_pipeline(str(folder)).named_parameters()
    values = {name: parameters[name].detach().clone() for name in names}
    ours = {"method": "ValueRefinement", "concepts": ["dog"], "model": str(folder), "edited_names": list(names)}
    return {
        "state_dict": {name: change(value) for name, value in values.items()},
        "hyper_parameters": {"dtype": "float32", **(arguments or {})},
        CHECKPOINT_KEY: {**ours, "base_fingerprint": fingerprint(values), **facts},
    }


def changed(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names whose values differ in any bit, in the order of ``first``; ``second`` has them all."""
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


# --- runs


class Interrupted(Exception):
    """Ends a run as a crash does."""


def hook(name: str, function: Callable[..., Any]) -> L.Callback:
    """A callback that calls ``function`` (trainer, module, ...) at one hook of the trainer."""
    callback = L.Callback()
    setattr(callback, name, function)
    return callback


def interrupt(name: str, *, step: int | None = None, epoch: int | None = None) -> L.Callback:
    """Raises ``Interrupted`` when the run comes to the hook ``name`` after so many steps, or in that epoch."""

    def stop(trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if step in (None, trainer.global_step) and epoch in (None, module.current_epoch):
            raise Interrupted

    return hook(name, stop)


def started(module: Module, fit: Callable[..., L.Trainer], **data: Any) -> Module:
    """``module`` as it is before its first step, able to take steps without a trainer."""
    with pytest.raises(Interrupted):
        fit(module, interrupt("on_train_batch_start"), **data)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # nothing to log to
    return module


def by_null_space(**settings: Any) -> ClosedFormEdit:
    """Writes within the null space."""
    return ClosedFormEdit(NullSpace(**settings))


def by_least_squares(**settings: Any) -> ClosedFormEdit:
    """Writes by least squares."""
    return ClosedFormEdit(LeastSquares(**settings))


def by_ridge_map(**settings: Any) -> ClosedFormEdit:
    """Writes as UCE does."""
    return ClosedFormEdit(RidgeMap(**settings))


def by_refined_null_space(**settings: Any) -> ClosedFormEdit:
    """Writes as SPEED does."""
    return ClosedFormEdit(RefinedNullSpace(**settings))


def half() -> ClosedFormEdit:
    """Half of the 32 inputs of K and V, whatever the spectrum."""
    return by_null_space(threshold=16, rule="count", ridge=1e-3)


def exact(ridge: float = 1e-3) -> ClosedFormEdit:
    """Directions in which the retained prompts have no key at all: others have 1e-13 of the largest, zeros 1e-16."""
    return by_null_space(threshold=1e-14, rule="max", ridge=ridge)


# --- pictures by the plain way


def sample_latents(
    unet: Any,
    scheduler: Any,
    encoder_hidden_states: Tensor,
    unconditional: Tensor,
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents (B, C, H, W) of prompts by their states (B, L, D): the plain loop that ``Pipeline.sample`` must equal."""
    states = encoder_hidden_states
    if guidance_scale != 1:
        states = torch.cat([unconditional.expand_as(states), states])
    sampler = set_steps(scheduler, num_inference_steps, unet.device)
    latents = noise.to(unet.dtype) * sampler.init_noise_sigma
    with torch.no_grad():
        for timestep in sampler.timesteps:
            several = torch.cat([latents] * (len(states) // len(latents)))
            output = unet(sampler.scale_model_input(several, timestep), timestep, states).sample
            if guidance_scale != 1:
                empty, prompted = output.chunk(2)
                output = empty + guidance_scale * (prompted - empty)
            latents = sampler.step(output, timestep, latents).prev_sample
    return latents


# --- tests by pictures


class Reddish:
    """A judge that answers by the mean red of a picture, and remembers what it was asked."""

    name = "reddish"

    def __init__(self) -> None:
        self.questions: list[str] = []

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.questions += questions
        return images[:, 0].mean(dim=(1, 2))


def moved(module: Module, judge: Callable[[], Any], factor: float = 3.0) -> Module:
    """``module`` with its edited weights multiplied by ``factor``, as if by an edit, and judged by ``judge()``."""
    module.load_judge = judge  # type: ignore[attr-defined]
    module.configure_model()
    with torch.no_grad():
        for name in module.edited_names:
            module.pipeline.named_parameters()[name].mul_(factor)
    return module


def score(
    module: ConceptEditor,
    folder: Path,
    *callbacks: L.Callback,
    logger: Logger | bool = False,
    precision: Any = "32-true",
    **data: object,
) -> L.Trainer:
    """Test ``module`` on the CPU, with ``data`` for ``ConceptPrompts``; it writes into ``folder``, or the logger's."""
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=logger,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    prompts = ConceptPrompts("dog", module.hparams["concept_set"], **data)  # type: ignore[arg-type]
    trainer.test(module, prompts, verbose=False)
    return trainer


# --- tensors


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(module: Any, *prompts: str) -> Tensor:
    """Text states (B, L, D) of ``prompts`` by the text encoder as it is now, without gradients."""
    with torch.no_grad():
        return encode_prompts(module.pipeline.tokenizer, module.pipeline.text_encoder, prompts)


def frozen(module: Any, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """What the UNet with its pretrained weights says of ``x`` (B, C, H, W) at ``t`` for ``states`` (B, L, D)."""
    return functional_call(module.unet, module.pretrained.of("unet"), (x, t, states)).sample


# --- checkpoints


def checkpoint_of(
    module: ConceptEditor, trainer_with: Callable[..., L.Trainer], pets: str, path: Path
) -> dict[str, Any]:
    """What a trainer stores of ``module``."""
    trainer = trainer_with(limit_predict_batches=0)
    trainer.predict(module, ConceptPrompts("dog", pets))
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def load_into(module: ConceptEditor, checkpoint: dict[str, Any]) -> None:
    """Load ``checkpoint`` as a trainer does."""
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


# --- files


def files(folder: Path) -> set[str]:
    """Paths of all files below ``folder``, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metadata(path: str) -> dict[str, str]:
    """What a file of safetensors says of itself."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def read_picture(path: str) -> Image.Image:
    """The picture at ``path``, in memory."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def assert_alike(a: Image.Image, b: Image.Image) -> None:
    """Of one size, and equal up to rounding: one of 256 levels."""
    first, second = (torch.from_numpy(np.array(picture)).int() for picture in (a, b))
    torch.testing.assert_close(first, second, rtol=0, atol=1)


# --- single files


def original(values: Mapping[str, Tensor], prefix: str, namer: Namer, keys: Keys = frozenset()) -> dict[str, Tensor]:
    """The tensors of one part in the layout of the original code.

    Args:
        values: All weights of the part by their names in diffusers.
        prefix: Beginning of the names in the file.
        namer: The map of names.
        keys: Names in the file that say how many blocks there are.
    """
    made: dict[str, Tensor] = {}
    for name, value in values.items():
        spot = namer(name, keys)
        assert spot is not None, name
        key, value = prefix + spot.key, value.detach()
        if spot.transposed:
            value = value.T
        if spot.convolution:
            value = value[..., None, None]
        taken = 0
        for start, stop, of in spot.fractions:
            total = value.shape[0] * of // sum(last - first for first, last, _ in spot.fractions)
            whole = made.setdefault(key, torch.full((total, *value.shape[1:]), torch.nan, dtype=value.dtype))
            size = (stop - start) * total // of
            whole[start * total // of : stop * total // of] = value[taken : taken + size]
            taken += size
        if not spot.fractions:
            assert key not in made
            made[key] = value.clone()
    assert not any(value.isnan().any() for value in made.values())
    return made


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    """The header of a file of safetensors, and all bytes behind it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]
