"""What every method shares: the pipeline's parts, the edited weights and their pretrained values, cost and losses."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.parameters import PretrainedValues, fingerprint, match_parameters
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import ForwardCount
from lit_unlearn.methods.shared.processes import Processes
from lit_unlearn.system.memory import peak_memory
from lit_unlearn.system.pixels import to_uint8

CHECKPOINT_KEY = "lit_unlearn"
"""Where a Lightning checkpoint holds what is ours: provenance, cost and reports of an edit."""

NO_COST: dict[str, float | int] = {"seconds": 0.0, "unet_forwards": 0, "unet_backwards": 0, "peak_memory_bytes": 0}


class DiffusionEditor(L.LightningModule):
    """Base of all methods: the pipeline's parts, which of their weights are edited, and what these were before.

    A checkpoint holds the edited weights and the optimizer's state, never the pipeline.

    Args:
        model: Folder of a pipeline in the diffusers layout, ``emoji-sd`` (the embedded model), or a hub id.
        revision: Branch, tag or commit, if ``model`` is a hub id.
        dtype: Type of the frozen weights: ``float32``, ``bfloat16`` or ``float16``. Edited weights have it too.
        edited_parameters: Group of weights (``xattn``, ``text-fc2``, ...) or regular expression over their names.
        num_inference_steps: Denoising steps of every picture.
        guidance_scale: Strength of classifier-free guidance of every picture.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    recipe: dict[str, Any] | None = None
    """What decided the fit, as a recipe, if it came from the command line."""

    def __init__(
        self,
        model: str = "emoji-sd",
        revision: str | None = None,
        dtype: str = "float32",
        edited_parameters: str = "xattn",
        num_inference_steps: int = 15,
        guidance_scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.processes = Processes(self)
        self.step_losses: dict[str, Tensor] = {}
        self._batch_weight = 1.0
        self.save_hyperparameters()
        self.strict_loading = False  # a checkpoint holds the edited weights only
        self.model_id, self.revision = model, revision
        self.edited_parameters = edited_parameters
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        if num_inference_steps < 1:
            raise ValueError(f"model.num_inference_steps={num_inference_steps} must be at least 1.")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"model.dtype={dtype!r} is unknown: choose float32, bfloat16 or float16.")
        self.weights_dtype: torch.dtype = getattr(torch, dtype)
        self.base = BaseModel.find(model, revision)
        if self.base.names:
            self.select(self.base.names)
        self.base.check_steps(num_inference_steps, "model.num_inference_steps")
        self.forwards = ForwardCount()
        # A callback that knows pictures of the unedited model says so here, for as long as its trainer runs.
        self.known_pictures: Callable[[Any, Any], Tensor] | None = None
        self.report: dict[str, Any] = {}
        self._loaded_cost = dict(NO_COST)
        self._started: float | None = None

    @property
    def edited_labels(self) -> list[str]:
        """What is edited, as checkpoints and folders name it: the concepts' names; none if it is no concept."""
        return []

    @property
    def current_layer(self) -> str | None:
        """Name of the weight whose turn it is, in a method that edits one after the other."""
        return None

    @property
    def fit_plan(self) -> FitPlan:
        """What a fit of this method asks of the data and of the trainer."""
        return FitPlan()

    def select(self, names: Sequence[str]) -> list[str]:
        """Names of the edited parameters among ``names``; methods narrow it."""
        return match_parameters(self.edited_parameters, names)

    def select_only(self, names: Sequence[str], allowed: Callable[[str], bool], why: str) -> list[str]:
        """As ``DiffusionEditor.select``, for methods that cannot edit every weight.

        Args:
            names: Full parameter names.
            allowed: Whether a weight can be edited.
            why: How the sentence ends that refuses another: what the method edits, and what to choose.

        Raises:
            ValueError: The pattern selects nothing, or a weight that is not allowed.
        """
        selected = DiffusionEditor.select(self, names)
        for name in selected:
            if not allowed(name):
                raise ValueError(f"edited_parameters={self.edited_parameters!r} selects {name}{why}")
        return selected

    # --- set-up and checkpoints

    def configure_model(self) -> None:
        """Load the pipeline's parts, frozen, and keep the pretrained values of the edited weights."""
        if hasattr(self, "pipeline"):
            return
        self.pipeline: Pipeline = self.base.load(self.weights_dtype)
        for name, part in self.pipeline.parts.items():  # Lightning moves them, and checkpoints name them so
            self.add_module(name, part)
        parameters = self.pipeline.named_parameters()
        self.edited_names = self.select(list(parameters))
        self.pretrained = PretrainedValues({name: parameters[name] for name in self.edited_names})
        self.base_fingerprint = fingerprint(self.pretrained.values)
        self.pipeline.denoiser.register_forward_pre_hook(self.forwards)

    def train(self, mode: bool = True) -> DiffusionEditor:
        """Keep the pipeline in evaluation mode whatever Lightning asks: there is no dropout to train with."""
        return super().train(False)

    def own_state(self) -> list[str]:
        """Names in ``state_dict`` that a checkpoint keeps besides the edited weights."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the edited weights only and say what they are."""
        kept = {*self.edited_names, *self.own_state()}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        # A class or function (an optimizer given in Python) could not be read without trusting the file.
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        checkpoint["hyper_parameters"] = {k: repr(v) if callable(v) else v for k, v in hyper_parameters.items()}
        checkpoint[CHECKPOINT_KEY] = {
            "method": type(self).__name__,
            "concepts": self.edited_labels,
            "model": self.model_id,
            "edited_names": self.edited_names,
            "base_fingerprint": self.base_fingerprint,
            "concept_set_sha256": None,
            "concept_set": None,
            "recipe": self.recipe,
            "cost": self.current_cost(),
            "report": self.report,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another concept, base model or set of weights.

        Raises:
            ValueError: What differs.
        """
        ours = checkpoint.get(CHECKPOINT_KEY)
        if ours is None:
            raise ValueError("The checkpoint was not made by lit-unlearn: it has no provenance.")
        check_concepts("The checkpoint", ours["method"], ours["concepts"], self.edited_labels)
        if ours["edited_names"] != self.edited_names or ours["base_fingerprint"] != self.base_fingerprint:
            raise ValueError(
                f"The checkpoint was made from another base model ({ours['model']}) than model={self.model_id!r}: "
                "its edited weights do not fit."
            )
        self._loaded_cost = dict(ours["cost"])
        self.report = ours["report"]

    # --- cost

    def on_fit_start(self) -> None:
        """Start the clock, and set the length of the run if the method knows it."""
        self._started, self.forwards.count, self.forwards.backward = time.perf_counter(), 0, 0
        if self.fit_plan.epochs is not None:
            self.trainer.fit_loop.max_epochs = self.fit_plan.epochs

    def on_fit_end(self) -> None:
        """Stop the clock: what follows in the same process is no cost of the edit."""
        self._loaded_cost = self.current_cost()
        self._started = None

    def current_cost(self) -> dict[str, float | int]:
        """What the fit has cost so far, with what a resumed run did before.

        Seconds, UNet forwards and backwards of all processes, peak memory of this one in bytes. During a fit every
        process must ask.
        """
        if self._started is None:
            return self._loaded_cost
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        passes = torch.tensor([self.forwards.count, self.forwards.backward], device=self.device)
        forwards, backwards = self.processes.total(passes).tolist()
        return {
            "seconds": self._loaded_cost["seconds"] + time.perf_counter() - self._started,
            "unet_forwards": self._loaded_cost["unet_forwards"] + forwards,
            "unet_backwards": self._loaded_cost.get("unet_backwards", 0) + backwards,
            "peak_memory_bytes": max(self._loaded_cost["peak_memory_bytes"], peak),
        }

    # --- losses

    def log_losses(self, losses: Mapping[str, Tensor], batch: Sequence[Any] | Tensor) -> None:
        """Log means over the global batch, keep them as ``step_losses``, and find this process's part of the batch.

        Args:
            losses: Means over this process's items, by the names that they are logged under.
            batch: These items.
        """
        self.step_losses = {name: loss.detach().float() for name, loss in losses.items()}
        if self.trainer.world_size > 1:
            count = torch.tensor([float(len(batch))], device=self.device)
            *sums, total = self.processes.total(
                torch.cat([torch.stack(list(self.step_losses.values())) * count, count])
            )
            self._batch_weight = float(self.trainer.world_size * count / total)
            self.step_losses = {name: value / total for name, value in zip(losses, sums, strict=True)}
        self.log_dict(self.step_losses, prog_bar=True, batch_size=len(batch))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Weight the loss by this process's part: DDP averages over processes, the loss is a mean over items.

        ``log_losses`` comes before it.
        """
        super().backward(loss * self._batch_weight, *args, **kwargs)

    # --- predictions and pictures

    @torch.no_grad()
    def pretrained_prediction(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """What the denoiser with its pretrained weights says, (B, C, H, W); arguments as of ``Pipeline.predict``."""
        return self.pipeline.predict(x_t, timesteps, condition, self.pretrained.of(self.pipeline.denoiser_part))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Measuring is no part of what an edit costs: forwards inside the block are not counted."""
        counts = self.forwards.count, self.forwards.backward
        try:
            yield
        finally:
            self.forwards.count, self.forwards.backward = counts

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W), uint8 on the CPU, of ``prompts``, each from its own seed."""
        return to_uint8(self.pipeline.draw(prompts, seeds, self.num_inference_steps, self.guidance_scale))

    def unedited_pictures(self, batch: Sequence[Any]) -> Tensor:
        """Pictures of ``batch`` (items with ``prompt`` and ``seed``) by the pretrained weights.

        A callback may know them already (``UneditedPictures``), and has then set ``known_pictures``.
        """
        if self.known_pictures is not None:
            return self.known_pictures(self, batch)
        with self.pretrained.restored():
            return self.generate([item.prompt for item in batch], [item.seed for item in batch])


def check_concepts(file: str, method: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a checkpoint of other concepts than those that are asked for.

    Args:
        file: The checkpoint, as the sentence begins.
        method: Name of the class that made it.
        found: Names of the concepts that it edits; none if it unlearned pictures.
        wanted: Names that are asked for; none if the recipe unlearns pictures.

    Raises:
        ValueError: They differ.
    """
    if list(found) == list(wanted):
        return
    names, asked = ", ".join(found), ", ".join(wanted)
    if not found:
        raise ValueError(f"{file} edits no concept ({method}), but concept is {asked}: give the recipe of its own fit.")
    if not wanted:
        raise ValueError(f"{file} edits {names}, but the recipe edits no concept: give the recipe of its own fit.")
    option = shlex.quote(json.dumps(list(found), ensure_ascii=False) if len(found) > 1 else found[0])
    raise ValueError(f"{file} edits {names}, but concept is {asked}: pass --concept {option}.")


def check_timesteps(min_timestep: int, max_timestep: int) -> None:
    """Check a range of timesteps, the upper end exclusive.

    Raises:
        ValueError: It is empty, or leaves the 1000 timesteps.
    """
    if not 0 <= min_timestep < max_timestep <= 1000:
        raise ValueError(
            f"model.min_timestep={min_timestep} and max_timestep={max_timestep}: need 0 <= min < max <= 1000."
        )
