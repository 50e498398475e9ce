"""A dry run of a fit: what it would edit, compute and need in memory, from configurations alone.

    plan = plan_fit(["fit", "--config", "null_space_context.yaml", "--config", "flux.yaml"])
    plan.print(console)

The recipe and its options are those of ``lit-unlearn fit``, and the method itself selects the weights. Memory is
counted by running the parts on the meta device (``diffusion.footprint``); what solvers need is computed from shapes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_unlearn.core.key_sums import MANY
from lit_unlearn.diffusion.described import DescribedModel
from lit_unlearn.diffusion.footprint import (
    decode_bytes,
    descent_bytes,
    encode_bytes,
    module_bytes,
    predict_bytes,
)
from lit_unlearn.diffusion.parameters import match_parameters
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.text_ways import way_of
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.moments import ROWS_BYTES
from lit_unlearn.methods.shared.noised import UNET_BATCH
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.errors import UserError
from lit_unlearn.training.classes import prepare
from lit_unlearn.training.cli import UnlearnCLI
from lit_unlearn.training.plan_table import DTYPES, Memory, Plan, Sites
from lit_unlearn.training.plan_work import PlannedWork

SCRATCH = 4
"""Matrices of d_in × d_in in a solve: the moment, its eigenvectors, and LAPACK's two for the decomposition."""


class _PlanCLI(UnlearnCLI):
    """Builds what the recipe names, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        assert subcommand == "fit"

    def _find_earlier_run(self, concepts: Sequence[str]) -> None:
        """A plan continues nothing."""


def plan_fit(args: Sequence[str]) -> Plan:
    """Plan a fit.

    Args:
        args: ``fit`` and its options, recipes as paths.

    Raises:
        UserError: As for a fit; or the recipe does not edit a model.
    """
    prepare()
    found_by = DiffusionEditor.find_base
    DiffusionEditor.find_base = staticmethod(DescribedModel.find)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left out: the plan says it
            cli = _PlanCLI(args)
    finally:
        DiffusionEditor.find_base = found_by  # type: ignore[method-assign]
    if not isinstance(cli.model, DiffusionEditor):
        raise UserError(f"plan: {type(cli.model).__name__} trains a model of its own: give a recipe that edits one.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Planner(cli).plan()


def solve_bytes(inputs: int, outputs: int, keys: int, retained: int | None = None) -> int:
    """Bytes of a solve in float64: moment and decomposition, keys and what they become, old and new weights, values.

    Args:
        inputs: Inputs of the maps that are solved together, d_in.
        outputs: Their outputs together.
        keys: Number of edited keys.
        retained: Number of retained keys, if these are kept instead of the moment; matrices are then as thin.
    """
    return 8 * (
        SCRATCH * inputs * (inputs if retained is None else retained)
        + 2 * keys * inputs
        + 2 * outputs * inputs
        + keys * outputs
    )


class _Planner(PlannedWork):
    """Works out a plan from what the command line has built."""

    def plan(self) -> Plan:
        plan = Plan(
            self.base.name,
            self.base.architecture,
            self.base.family.title,
            type(self.module).__name__,
            self.dtype,
            self._sites(),
            self._unread(),
            {name: sum(value.numel() for value in module.parameters()) for name, module in self.described.items()},
            clip_skip=self.base.clip_skip,
        )
        for dtype in dict.fromkeys((*DTYPES, self.dtype)):
            plan.memory[dtype] = self._phases(getattr(torch, dtype))
        plan.counts = self._counts()
        plan.optimizer = self._training_bytes()
        plan.ram = self._ram(plan)
        return plan

    def _sites(self) -> list[Sites]:
        found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for name in self.names:
            part, _, inside = name.partition(".")
            kind = re.sub(r"^.*\.\d+\.|^(?=[^.]+$)", "", inside.removesuffix(".weight"))
            found[part, kind, self.shapes[name]] += 1
        return [Sites(*key, count) for key, count in found.items()]

    def _unread(self) -> list[str]:
        matched = match_parameters(self.module.edited_parameters, self.base.names)
        unread = set(self.base.unread(self.base.names))
        return [name for name in matched if name in unread]

    # --- memory

    def _phases(self, dtype: torch.dtype) -> dict[str, Memory]:
        pipeline = self.base.pipeline(dtype)
        sizes = {name: module_bytes(part) for name, part in pipeline.parts.items()}
        everything, denoiser = sum(sizes.values()), sizes[pipeline.denoiser_part]
        texts = [text.part for text in pipeline.texts]
        together = min(ENCODE_BATCH, max(1, self.edited, self.retained))
        reading = {part: sizes[part] + encode_bytes(pipeline, together, part) for part in texts}
        kept = self._states_bytes(pipeline)
        gathering = self._gathering_bytes()
        gathered = kept if self.in_blocks else kept + gathering
        phases = {
            "load": Memory(everything, 0),
            "encode": Memory(
                everything + encode_bytes(pipeline, together) + gathered, max(reading.values()) + gathered
            ),
        }
        if self.in_blocks:
            asked = self._asked_bytes(pipeline)
            more = predict_bytes(pipeline, min(UNET_BATCH, self.module.retained_items)) + kept + asked + gathering
            phases["retained keys"] = Memory(everything + more, denoiser + more)
            if self.holding is not None and len(self.holding.groups) > 1:  # for the passes of further groups
                kept += asked
        if self.descends:
            trains = isinstance(self.module, GradientEditor)
            trained = [name for name in self.names if not name.startswith("vae.")]
            through = not all(name.startswith(f"{pipeline.denoiser_part}.") for name in trained)
            computing = self._computing(pipeline)
            more = descent_bytes(computing, self._batch(), trained, through) + self._training_bytes(dtype)
            more += kept + self._goals_bytes(computing.dtype)
            if trains:  # their gradients are counted twice
                more -= self._numel() * computing.dtype.itemsize
            held = denoiser + (sum(sizes[part] for part in texts) if through else 0)
            phases["descent"] = Memory(everything + more, held + more)
        if isinstance(self.module, ClosedFormMethod):
            solving = self._solve_bytes() + self._block_bytes()
            edited = sum(sizes[part] for part in {name.partition(".")[0] for name in self.names})
            phases["solve"] = Memory(everything + solving + kept, edited + solving + kept)
        pictures = getattr(self.data, "eval_batch_size", 1)
        rows = pictures * self._guided(pipeline, self.module.guidance_scale)
        drawing = denoiser + predict_bytes(pipeline, rows)
        decoder = everything - denoiser - sum(sizes[part] for part in texts)
        decoding = decoder + decode_bytes(pipeline, pictures)
        reading_now = max(sizes[part] + encode_bytes(pipeline, pictures, part) for part in texts)
        phases[f"draw ({pictures} at once)"] = Memory(
            everything + max(drawing - denoiser, decoding - decoder), max(drawing, decoding, reading_now)
        )
        return phases

    def _numel(self) -> int:
        return sum(torch.Size(self.shapes[name]).numel() for name in self.names)

    def _training_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of gradients and optimizer state, and of the pretrained values that a method compares with."""
        if not self.descends:
            return 0
        dtype = dtype or self.module.weights_dtype
        count = self._numel()
        if not isinstance(self.module, GradientEditor):  # V1 of one layer, at all positions of all pairs
            outputs = max(self.shapes[name][0] for name in self.names)
            pipeline = self.base.pipeline(torch.float32)
            length = max(text.length for text in pipeline.texts)
            keys = max(self._edited_keys(name) for name in self.names) if self.in_blocks else 0
            count, dtype = (keys or self.edited * length) * outputs, torch.float32
        per_weight = _state_bytes(self.module.optimizer, dtype) + dtype.itemsize
        return round(count * (per_weight + dtype.itemsize))

    def _states_bytes(self, pipeline: Pipeline) -> int:
        """Bytes of the edited states and those that they are edited into, float32, kept from encode to solve."""
        if not isinstance(self.module, ClosedFormMethod):
            return 0
        count = 2 * self.edited
        if self.in_blocks:  # the conditions alone; keys are made for one layer after the other
            return 4 * count * self.length * self._state_width(pipeline)
        if hasattr(self.module, "retained_texts"):  # SPEED keeps each of them
            count += self.retained
        ways = {way: self.shapes[name][1] for name in self.names if (way := way_of(name))}
        if ways:
            length = self.length
            # Of each way what its maps read, which may be narrower than the states of the text encoders.
            kept = count * sum(width * (1 if way == "pooled" else length) for way, width in ways.items())
            if isinstance(self.module, ValueRefinement):  # it also keeps the conditions that these are made of
                kept += 2 * self.edited * length * self._state_width(pipeline)
            return 4 * kept
        widths = [self.shapes[name][1] for name in self.names if len(self.shapes[name]) == 2]
        return count * max(text.length for text in pipeline.texts) * max(widths, default=0) * 4

    def _asked_bytes(self, pipeline: Pipeline) -> int:
        """Bytes of what an edit in blocks asks the denoiser of retained prompts: their states, and x_t of each item."""
        prompts = len(self.module.retain_prompts) + bool(self.module.retain_empty)
        items = len(self.module.retain_prompts) * self.module.noises_per_retained_prompt
        states = prompts * self.length * self._state_width(pipeline) * pipeline.dtype.itemsize
        return states + 4 * items * torch.Size(pipeline.latent_shape).numel()

    def _state_width(self, pipeline: Pipeline) -> int:
        """Width of the text states that the denoiser is given."""
        config: Any = pipeline.denoiser.config
        fields = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
        width = next(found for field in fields if (found := config.get(field)))
        return width if isinstance(width, int) else max(width)

    def _gathering_bytes(self) -> int:
        """Bytes on the device to add some keys to a moment: the keys in float64, and their product."""
        if self.holding is None:
            return 0
        most = 0
        for name in self.names:
            width, keys = self.shapes[name][1], self.kept_keys[name]
            product = 0 if name in self.holding.thin else 8 * width**2
            most = max(most, product + min(ROWS_BYTES, 8 * width * keys))
        return most

    def _block_bytes(self) -> int:
        """Bytes of the edited keys and outputs of the largest layer in a block, and of V1, float32."""
        if not self.in_blocks:
            return 0
        sizes = [(self._edited_keys(name), *self.shapes[name]) for name in self.names]
        values = max(keys for keys, _, _ in sizes) * max(outputs for _, outputs, _ in sizes)
        return 4 * (max(keys * (inputs + outputs) for keys, outputs, inputs in sizes) + values)

    def _solve_bytes(self) -> int:
        """Bytes of the largest solve, float64: moment and decomposition, keys, and each map with its new values."""
        most = 0
        for group in self._groups():
            inputs = self.shapes[group[0]][1]
            outputs = sum(self.shapes[name][0] for name in group)
            keys = self._edited_keys(group[0])
            if keys > MANY * inputs:  # sums take their place, of parts that have as many keys as there are inputs
                keys = 2 * inputs
            thin = self.holding is not None and group[0] in self.holding.thin
            most = max(most, solve_bytes(inputs, outputs, keys, self.kept_keys[group[0]] if thin else None))
        return most

    def _ram(self, plan: Plan) -> dict[str, int]:
        size = getattr(torch, self.dtype).itemsize
        found = {
            "largest part, while loading": max(plan.parameters.values()) * size,
            "all parts, with --offload": sum(plan.parameters.values()) * size,
            "edited weights before the edit": self._numel() * size,
        }
        if isinstance(self.module, ClosedFormMethod):
            inputs = [self.shapes[group[0]][1] for group in self._groups()]
            every = sum(2 * 8 * width**2 for width in inputs)
            found["moments and null spaces, float64"] = self.holding.most if self.holding else every
        return found


def _state_bytes(make: Any, dtype: torch.dtype) -> float:
    """Bytes of an optimizer's state for each weight, from a step on a few weights."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(value.nbytes for value in states) / weight.numel()
