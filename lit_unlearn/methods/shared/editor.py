"""Base of all methods: the pipeline's parts, the edited weights and their pretrained values, cost and losses."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_unlearn import __version__
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import how_unread
from lit_unlearn.diffusion.compiled import check_compiler, compile_drawing
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.offload import Offload, bring
from lit_unlearn.diffusion.parameters import PretrainedValues, fingerprint, match_parameters
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import ForwardCount
from lit_unlearn.methods.shared.placing import offload_device
from lit_unlearn.methods.shared.processes import Processes
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY, EarlierEdits, check_concepts
from lit_unlearn.system.errors import plain_warnings
from lit_unlearn.system.memory import peak_memory
from lit_unlearn.system.names import check_numbers
from lit_unlearn.system.pixels import to_uint8

NO_COST: dict[str, float | int] = {"seconds": 0.0, "unet_forwards": 0, "unet_backwards": 0, "peak_memory_bytes": 0}


class DiffusionEditor(L.LightningModule):
    """Base of all methods: the pipeline's parts, the edited weights, and their values before the edit.

    A checkpoint holds the edited weights and the optimizer's state, never the pipeline.

    Args:
        model: Folder in the diffusers layout, single file (``.safetensors``), ``emoji-sd`` (embedded), or a hub id.
        revision: Branch, tag or commit, if ``model`` is a hub id.
        config_folder: Folder in the diffusers layout with what a single file ``model`` does not hold.
        clip_skip: Layers of the CLIPs that prompts are read earlier, as in diffusers' calls; None for none.
        dtype: Type of all weights: ``float32``, ``bfloat16`` or ``float16``.
        edited_parameters: Group of weights (``xattn``, ``text-fc2``, ...) or regular expression over their names.
        num_inference_steps: Denoising steps of every picture.
        guidance_scale: Strength of classifier-free guidance of every picture.
        offload: Keep the parts in the processor's memory, and move each to the GPU only while it is used: slower, for
            models that do not fit there at once.
        torch_compile: Draw pictures with kernels that ``torch.compile`` makes: a minute or more for the first ones, and
            less time for all others, so give it to ``test``. They differ in the last bits from those drawn without.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    needs_cross_attention: ClassVar[bool] = False
    """Whether the method works only with denoisers that attend to the prompt alone in layers of their own (UNets)."""

    find_base: ClassVar[Callable[..., BaseModel]] = BaseModel.find
    """Finds the base model; a plan replaces it, since it needs no weights."""

    recipe: dict[str, Any] | None = None
    """Everything that determined the fit, as a recipe, if it was run from the command line."""

    def __init__(
        self,
        model: str = "emoji-sd",
        revision: str | None = None,
        dtype: str = "float32",
        edited_parameters: str = "xattn",
        num_inference_steps: int = 15,
        guidance_scale: float = 4.0,
        config_folder: str | None = None,
        offload: bool = False,
        torch_compile: bool = False,
        clip_skip: int | None = None,
    ) -> None:
        super().__init__()
        self.processes = Processes(self)
        self.earlier_edits = EarlierEdits(self)
        self.step_losses: dict[str, Tensor] = {}
        self._batch_weight = 1.0
        self.save_hyperparameters()
        self.strict_loading = False  # a checkpoint holds the edited weights only
        self.model_id, self.revision = model, revision
        self.edited_parameters, self.offload, self.torch_compile = edited_parameters, offload, torch_compile
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        check_numbers("model", num_inference_steps=num_inference_steps)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"model.dtype={dtype!r} is unknown: choose float32, bfloat16 or float16.")
        self.weights_dtype: torch.dtype = getattr(torch, dtype)
        self.base = self.find_base(model, revision, config_folder, clip_skip)
        if self.base.names:
            self._check_family()
            self.select(self.base.names)
        self.base.check_steps(num_inference_steps, "model.num_inference_steps")
        self.forwards = ForwardCount()
        # Set while the trainer runs, by a callback that has pictures of the unedited model.
        self.known_pictures: Callable[[Any, Any], Tensor] | None = None
        self.report: dict[str, Any] = {}
        self._loaded_cost = dict(NO_COST)
        self._started: float | None = None
        self.offloaded: Offload | None = None

    def _check_family(self) -> None:
        """Refuse a model of a family that the method cannot edit, before its weights are loaded."""
        family = self.base.family
        if self.needs_cross_attention and not family.cross_attention:
            raise ValueError(
                f"model={self.model_id!r} is of {family.title}, without cross-attention to the prompt alone, which "
                f"{type(self).__name__} changes: choose another method, or Stable Diffusion 1.x, 2.x, XL or PixArt."
            )

    @property
    def edited_labels(self) -> list[str]:
        """Names of the edited concepts, for checkpoints and folders; empty if the method does not edit concepts."""
        return []

    @property
    def current_layer(self) -> str | None:
        """Name of the weight that is being edited, in a method that edits one after the other."""
        return None

    @property
    def fit_plan(self) -> FitPlan:
        """What a fit of this method needs from the data and the trainer."""
        return FitPlan()

    def select(self, names: Sequence[str]) -> list[str]:
        """Names of the edited parameters among ``names``; methods may restrict the choice."""
        for part, declared in self.base.family.declared.items():
            missing = declared.optional and not any(name.startswith(f"{part}.") for name in names)
            if missing and declared.has_weights and part in self.edited_parameters:
                raise ValueError(
                    f"edited_parameters={self.edited_parameters!r} names {part}, which model={self.model_id!r} does "
                    "not have: edit other weights, or take a model with it."
                )
        return match_parameters(self.edited_parameters, names, self.base.unread(names), how_unread(self.base.clip_skip))

    def select_only(self, names: Sequence[str], allowed: Callable[[str], bool], why: str) -> list[str]:
        """As ``DiffusionEditor.select``, for methods that cannot edit every weight.

        Args:
            names: Full parameter names.
            allowed: Whether a weight can be edited.
            why: End of the sentence that refuses another weight: what the method edits, and what to choose.

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
        """Load the pipeline's parts, frozen, write earlier edits, and keep the values of the edited weights."""
        if hasattr(self, "pipeline"):
            return
        self._check_family()
        device = offload_device(self)
        if self.torch_compile:
            check_compiler(torch.get_default_device(), "model.torch_compile")  # where Lightning moves the parts
            rank_zero_info("torch.compile makes kernels when the first pictures are drawn, which may take minutes.")
        self.pipeline: Pipeline = self.base.load(self.weights_dtype, torch.device("cpu") if device else None)
        for name, part in self.pipeline.parts.items():  # so that Lightning moves them; checkpoints use the names
            self.add_module(name, part)
        parameters = self.pipeline.named_parameters()
        self.edited_names = self.select(list(parameters))
        self.earlier_edits.write(parameters)
        self.pretrained = PretrainedValues({name: parameters[name] for name in self.edited_names})
        self.base_fingerprint = fingerprint(self.unedited.values)
        self.pipeline.denoiser.register_forward_pre_hook(self.forwards)
        if device:
            self.offloaded = Offload(self.pipeline.parts, device)
        if self.torch_compile:
            compile_drawing(self.pipeline)

    @property
    def unedited(self) -> PretrainedValues:
        """The base model's values of all weights in a checkpoint; ``pretrained`` if the fit starts from that model."""
        return self.earlier_edits.base_values or self.pretrained

    @property
    def written_names(self) -> list[str]:
        """Names of the weights in a checkpoint: those that the fit edits, and those of the edits it starts from."""
        return list(found.values) if (found := self.earlier_edits.base_values) else self.edited_names

    @property
    def new_labels(self) -> list[str]:
        """Those of ``edited_labels`` that are not of edits which the fit starts from."""
        return self.edited_labels

    @property
    def again_labels(self) -> list[str]:
        """Concepts of earlier edits that the fit edits again."""
        return []

    @property
    def trains_text(self) -> bool:
        """Whether weights of a text encoder are edited: if not, prompts are encoded once."""
        parts = {text.part for text in self.pipeline.texts}
        return any(name.partition(".")[0] in parts for name in self.edited_names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionEditor:
        """Move everything but the parts, if they move by themselves."""
        if self.offloaded is None:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]
        parts = {name: self._modules.pop(name) for name in self.offloaded.parts}
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]
        finally:
            self._modules.update(parts)

    @contextmanager
    def edited_in_place(self) -> Iterator[None]:
        """Within the block, all parts with edited weights are on the device."""
        if self.offloaded is None:
            yield
            return
        with self.offloaded.holding(name.partition(".")[0] for name in self.written_names):
            yield

    def on_after_backward(self) -> None:
        """Parts that a gradient has flowed through need not stay on the device any more."""
        if self.offloaded is not None:
            self.offloaded.release()

    def train(self, mode: bool = True) -> DiffusionEditor:
        """Keep the pipeline in evaluation mode, since methods train without dropout."""
        return super().train(False)

    def own_state(self) -> list[str]:
        """Names in ``state_dict`` that a checkpoint stores besides the edited weights."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store only the edited weights, and describe them."""
        kept = {*self.written_names, *self.own_state()}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        # A class or function (an optimizer given in Python) could not be read without trusting the file.
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        checkpoint["hyper_parameters"] = {k: repr(v) if callable(v) else v for k, v in hyper_parameters.items()}
        checkpoint[CHECKPOINT_KEY] = {
            "method": type(self).__name__,
            "concepts": self.edited_labels,
            "model": self.model_id,
            "edited_names": self.written_names,
            "base_fingerprint": self.base_fingerprint,
            "chain": self.earlier_edits.stored(),
            "version": __version__,
            "concept_set_sha256": None,
            "concept_set": None,
            "recipe": self.recipe,
            "cost": self.current_cost(),
            "report": self.report,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another concept, base model or set of weights.

        Raises:
            ValueError: The checkpoint does not match; the message says what differs.
        """
        ours = checkpoint.get(CHECKPOINT_KEY)
        if ours is None:
            raise ValueError("The checkpoint was not made by lit-unlearn, since it has no provenance: give another.")
        check_concepts("The checkpoint", ours["method"], ours["concepts"], self.edited_labels)
        self.earlier_edits.take(ours.get("chain"), ours["edited_names"])
        if ours["edited_names"] != self.written_names or ours["base_fingerprint"] != self.base_fingerprint:
            raise ValueError(
                f"The checkpoint was made from another base model ({ours['model']}) than model={self.model_id!r}, "
                "or with another dtype or other edited weights: give the recipe of its own fit."
            )
        self._loaded_cost = dict(ours["cost"])
        self.report = ours["report"]

    # --- cost

    def on_fit_start(self) -> None:
        """Start the clock, and set the length of the run if the method determines it."""
        self._started, self.forwards.count, self.forwards.backward = time.perf_counter(), 0, 0
        if self.fit_plan.epochs is not None:
            self.trainer.fit_loop.max_epochs = self.fit_plan.epochs

    def on_fit_end(self) -> None:
        """Stop the clock: later work in the same process is not a cost of the edit."""
        self._loaded_cost = self.current_cost()
        self._started = None

    def current_cost(self) -> dict[str, float | int]:
        """Cost of the fit so far, including the work before a run was resumed.

        Seconds, UNet forwards and backwards of all processes, and peak memory of this process in bytes. During a fit
        every process must call it.
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
            losses: Means over this process's items, by their names in the log.
            batch: Items of this process.
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
        """Weight the loss by this process's part, since DDP averages over processes, but the loss is a mean over items.

        ``log_losses`` must be called before it.
        """
        super().backward(loss * self._batch_weight, *args, **kwargs)

    # --- predictions and pictures

    @torch.no_grad()
    def pretrained_prediction(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Prediction (B, C, H, W) of the denoiser with its pretrained weights; arguments as in ``Pipeline.predict``."""
        bring(self.pipeline.denoiser)  # so that the values go where it is
        return self.pipeline.predict(x_t, timesteps, condition, self.pretrained.of(self.pipeline.denoiser_part))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Do not count forwards inside the block, since measuring is not a cost of the edit."""
        counts = self.forwards.count, self.forwards.backward
        try:
            yield
        finally:
            self.forwards.count, self.forwards.backward = counts

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W), uint8 on the CPU, of ``prompts``, each from its own seed; black if not finite."""
        pictures = self.pipeline.draw(prompts, seeds, self.num_inference_steps, self.guidance_scale)
        if not pictures.isfinite().all():
            with plain_warnings():
                warnings.warn(
                    "Pictures that are not finite are drawn as black ones, which show no concept: the edit or the base "
                    "model is broken, or the precision is too low for it.",
                    stacklevel=1,
                )
        return to_uint8(pictures)

    def unedited_pictures(self, batch: Sequence[Any]) -> Tensor:
        """Pictures of ``batch`` (items with ``prompt`` and ``seed``) by the base model.

        If the callback ``UneditedPictures`` has set ``known_pictures``, they come from there.
        """
        if self.known_pictures is not None:
            return self.known_pictures(self, batch)
        with self.unedited.restored():
            return self.generate([item.prompt for item in batch], [item.seed for item in batch])


def check_timesteps(min_timestep: int, max_timestep: int) -> None:
    """Check a range of timesteps, the upper end exclusive.

    Raises:
        ValueError: The range is empty, or goes beyond the 1000 timesteps.
    """
    if not 0 <= min_timestep < max_timestep <= 1000:
        raise ValueError(
            f"model.min_timestep={min_timestep} and max_timestep={max_timestep}: need 0 <= min < max <= 1000."
        )
