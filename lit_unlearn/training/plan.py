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

from lit_unlearn.data.prompts import ConceptPrompts
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
from lit_unlearn.edits.chain import title_of
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.moments import ROWS_BYTES, Holding, holding
from lit_unlearn.methods.shared.retained_layers import retains_empty
from lit_unlearn.methods.shared.text_layers import TEXT_LAYER, part_of
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.errors import UserError
from lit_unlearn.training.classes import prepare
from lit_unlearn.training.cli import UnlearnCLI
from lit_unlearn.training.plan_table import DTYPES, Memory, Plan, Sites

EDITED_TEXTS = ("edit_prompts", "phrases", "edited_texts", "pairs")
"""Where a method has the texts that it edits; it has as many that they are edited into."""
ONE_STATE = ("last_subject",)
"""Values of ``tokens`` that edit one state of a text."""
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


class _Planner:
    """Works out a plan from what the command line has built."""

    def __init__(self, cli: UnlearnCLI) -> None:
        self.module: Any = cli.model
        self.data: Any = cli.datamodule
        self.trainer: Any = cli.trainer
        self.stack = cli.stack
        base = self.module.base
        assert isinstance(base, DescribedModel)
        self.base = base
        self.module.edited_names = self.names = self.module.select(base.names)
        self.dtype = str(self.module.weights_dtype).removeprefix("torch.")
        self.edited = next((len(getattr(self.module, name)) for name in EDITED_TEXTS if hasattr(self.module, name)), 0)
        self.retained = len(self.module.kept_texts) if isinstance(self.module, ConceptEditor) else 0
        self.descends = isinstance(self.module, GradientEditor) or (
            isinstance(self.module, ValueRefinement) and self.module.value_choice == "refined"
        )

    def plan(self) -> Plan:
        described = self.base.parts(torch.float32)
        self.shapes = {
            f"{part}.{name}": tuple(value.shape)
            for part, module in described.items()
            for name, value in module.named_parameters()
        }
        self.holding = self._holding()
        plan = Plan(
            self.base.name,
            self.base.architecture,
            self.base.family.title,
            type(self.module).__name__,
            self.dtype,
            self._sites(),
            self._unread(),
            {name: sum(value.numel() for value in module.parameters()) for name, module in described.items()},
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
        gathered = kept + self._gathering_bytes()
        phases = {
            "load": Memory(everything, 0),
            "encode": Memory(
                everything + encode_bytes(pipeline, together) + gathered, max(reading.values()) + gathered
            ),
        }
        if self.descends:
            trains = isinstance(self.module, GradientEditor)
            trained = [name for name in self.names if not name.startswith("vae.")]
            through = not all(name.startswith(f"{pipeline.denoiser_part}.") for name in trained)
            computing = self._computing(pipeline)
            more = descent_bytes(computing, self._batch(), trained, through) + self._training_bytes(dtype)
            if trains:  # their gradients are counted twice
                more -= self._numel() * computing.dtype.itemsize
            held = denoiser + (sum(sizes[part] for part in texts) if through else 0)
            phases["descent"] = Memory(everything + more, held + more)
        if isinstance(self.module, ClosedFormMethod):
            solving = self._solve_bytes(pipeline)
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

    def _computing(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline in the type that a mixed precision computes in."""
        precision = str(self.trainer.precision)
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        return pipeline if half is None or pipeline.dtype == half else self.base.pipeline(half)

    def _batch(self) -> int:
        size = getattr(self.data, "batch_size", 1)
        return int(size or self.module.fit_plan.num_pairs or self.edited or 1)

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
            count, dtype = self.edited * self._length() * outputs, torch.float32
        per_weight = _state_bytes(self.module.optimizer, dtype) + dtype.itemsize
        return round(count * (per_weight + dtype.itemsize))

    def _length(self) -> int:
        return max(text.length for text in self.base.pipeline(torch.float32).texts)

    def _states_bytes(self, pipeline: Pipeline) -> int:
        """Bytes of the edited states and those that they are edited into, float32, kept from encode to solve."""
        if not isinstance(self.module, ClosedFormMethod):
            return 0
        count = 2 * self.edited
        if hasattr(self.module, "retained_texts"):  # SPEED keeps each of them
            count += self.retained
        ways = {way: self.shapes[name][1] for name in self.names if (way := way_of(name))}
        if ways:
            length = sum(pipeline.texts[number].length for number in pipeline.token_order)
            # Of each way what its maps read, which may be narrower than the states of the text encoders.
            kept = count * sum(width * (1 if way == "pooled" else length) for way, width in ways.items())
            if isinstance(self.module, ValueRefinement):  # it also keeps the conditions that these are made of
                kept += 2 * self.edited * length * self._state_width(pipeline)
            return 4 * kept
        widths = [self.shapes[name][1] for name in self.names if len(self.shapes[name]) == 2]
        return count * max(text.length for text in pipeline.texts) * max(widths, default=0) * 4

    def _state_width(self, pipeline: Pipeline) -> int:
        """Width of the text states that the denoiser is given."""
        config: Any = pipeline.denoiser.config
        fields = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
        width = next(found for field in fields if (found := config.get(field)))
        return width if isinstance(width, int) else max(width)

    def _holding(self) -> Holding | None:
        """Which moments an edit of text layers holds at once; None for another edit.

        Of a T5 whose padding is not read, a plan does not know the lengths of the prompts: it counts as many retained
        keys as there could be.
        """
        texts = all(TEXT_LAYER.match(name) for name in self.names)
        if not isinstance(self.module, ValueRefinement) or not texts:
            return None
        pipeline = self.base.pipeline(torch.float32)
        empty = retains_empty(pipeline) if self.module.retain_empty is None else self.module.retain_empty
        prompts = len(self.module.retain_prompts) + int(empty)
        self.kept_keys = {text.part: prompts * text.length for text in pipeline.texts}
        counts = {name: self.kept_keys[part_of(name)] for name in self.names}
        return holding({name: self.shapes[name][1] for name in self.names}, counts)

    def _gathering_bytes(self) -> int:
        """Bytes on the device to add some keys to a moment: the keys in float64, and their product."""
        if self.holding is None:
            return 0
        most = 0
        for name in self.names:
            width, keys = self.shapes[name][1], self.kept_keys[part_of(name)]
            product = 0 if name in self.holding.thin else 8 * width**2
            most = max(most, product + min(ROWS_BYTES, 8 * width * keys))
        return most

    def _groups(self) -> list[list[str]]:
        """Edited weights that are solved together."""
        ways: dict[str, list[str]] = {}
        for name in self.names:
            ways.setdefault(way_of(name) or name, []).append(name)
        return list(ways.values())

    def _solve_bytes(self, pipeline: Pipeline) -> int:
        """Bytes of the largest solve, float64: moment and decomposition, keys, and each map with its new values."""
        most = 0
        for group in self._groups():
            inputs = self.shapes[group[0]][1]
            outputs = sum(self.shapes[name][0] for name in group)
            one = way_of(group[0]) == "pooled" or getattr(self.module, "tokens", None) in ONE_STATE
            length = sum(pipeline.texts[number].length for number in pipeline.token_order)
            keys = self.edited * (1 if one else length)
            thin = self.holding is not None and group[0] in self.holding.thin
            most = max(most, solve_bytes(inputs, outputs, keys, self.kept_keys[part_of(group[0])] if thin else None))
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

    # --- work

    def _guided(self, pipeline: Pipeline, guidance: float) -> int:
        config: Any = pipeline.denoiser.config
        return 1 if guidance == 1 or "guidance_embeds" in config else 2

    def _counts(self) -> dict[str, str]:
        module, plan = self.module, self.module.fit_plan
        found = {}
        if self.stack is not None:
            below = [title_of(link["concepts"], link["method"]) for link in self.stack.links]
            found["edits that it starts from"] = "; ".join(below)
        if self.edited:
            texts = f"{self.edited} edited, {self.edited} targets, {self.retained} retained"
            found["prompts encoded at the start"] = f"{2 * self.edited + self.retained:,} ({texts})"
        epochs = plan.epochs or self.trainer.max_epochs or 1
        if isinstance(module, ClosedFormMethod):
            rounds = getattr(module, "rounds", 1)
            solves = len(self._groups()) * rounds
            inputs = sorted({self.shapes[group[0]][1] for group in self._groups()})
            if self.holding and (groups := len(self.holding.groups)) > 1:
                found["passes over the retained prompts"] = f"{groups * rounds:,} ({groups} groups of layers)"
            found["solves"] = f"{solves:,} (with {' and '.join(f'{width:,}' for width in inputs)} inputs)"
        if self.descends:
            steps = epochs * (plan.steps or getattr(self.data, "steps", 1))
            forwards, exact = self._forwards(steps * self._batch())
            found["steps of gradient descent"] = f"{steps:,} of {self._batch()}"
            found["denoiser: forwards of one picture"] = f"{'' if exact else 'at least '}{forwards:,}"
            found["denoiser: backwards of one picture"] = f"{steps * self._batch():,}"
        elif isinstance(module, ClosedFormMethod):
            found["denoiser: forwards of one picture"] = "0"
        if isinstance(self.data, ConceptPrompts):
            pictures = len(self.data.test_dataloader().dataset)  # type: ignore[arg-type]
            rows = self._guided(self.base.pipeline(torch.float32), module.guidance_scale)
            passes = pictures * module.num_inference_steps * rows
            found["a test: pictures before, and after"] = f"{pictures:,}"
            found["a test: forwards of one picture"] = f"{2 * passes:,}"
        return found

    def _forwards(self, uses: int) -> tuple[int, bool]:
        """Forward passes of a fit with so many uses of a picture, and whether that is all."""
        module = self.module
        pipeline = self.base.pipeline(torch.float32)
        if isinstance(module, ESD):
            if module.states_per_chain == "all":
                chains = -(-uses // (module.chains * module.num_chain_steps * module.passes)) * module.chains
                return chains * module.num_chain_steps * 2 + uses, module.erase_from is None
            return round(uses * (module.num_chain_steps - 1)) + 3 * uses, False  # half a chain on average
        if isinstance(module, ConceptAblation):
            drawn = module.images * len(module.edited) * module.anchor_inference_steps
            rows = self._guided(pipeline, module.anchor_guidance_scale)
            return drawn * rows + uses * (2 if module.objective == "model" else 1), module.prior_weight == 0
        if type(module) is ValueRefinement:
            rows = self._guided(pipeline, module.guidance_scale)
            return module.latents_per_prompt * self.edited * module.num_inference_steps * rows + 2 * uses, True
        return uses, False


def _state_bytes(make: Any, dtype: torch.dtype) -> float:
    """Bytes of an optimizer's state for each weight, from a step on a few weights."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(value.nbytes for value in states) / weight.numel()
