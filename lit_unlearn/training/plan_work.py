"""What a fit would edit, and the work that it would do, from its command line and the configurations of its model."""

from __future__ import annotations

from typing import Any

import torch

from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.described import DescribedModel
from lit_unlearn.diffusion.footprint import condition_of
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.text_ways import way_of
from lit_unlearn.edits.chain import title_of
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.moments import Holding, holding
from lit_unlearn.methods.shared.noised import RoundGoals
from lit_unlearn.methods.shared.retained_layers import retains_empty
from lit_unlearn.methods.shared.text_layers import TEXT_LAYER, part_of
from lit_unlearn.methods.shared.unet_layers import places_in_block
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.training.cli import UnlearnCLI

EDITED_TEXTS = ("edit_prompts", "phrases", "edited_texts", "pairs")
"""Where a method has the texts that it edits; it has as many that they are edited into."""
ONE_STATE = ("last_subject",)
"""Values of ``tokens`` that edit one state of a text."""


class PlannedWork:
    """Reads what the command line has built.

    Args:
        cli: The command line of a fit, whose model is described by configurations.
    """

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
        self.in_blocks = isinstance(self.module, UNetFeedForwardRefinement)
        self.described = base.parts(torch.float32)
        self.shapes = {
            f"{part}.{name}": tuple(value.shape)
            for part, module in self.described.items()
            for name, value in module.named_parameters()
        }
        self.length, self.places = self._positions()
        self.kept_keys = self._kept_keys()
        self.holding = self._holding()

    def _batch(self) -> int:
        size = getattr(self.data, "batch_size", 1)
        return int(size or self.module.fit_plan.num_pairs or self.edited or 1)

    def _groups(self) -> list[list[str]]:
        """Edited weights that are solved together."""
        ways: dict[str, list[str]] = {}
        for name in self.names:
            ways.setdefault(way_of(name) or name, []).append(name)
        return list(ways.values())

    def _positions(self) -> tuple[int, dict[str, int]]:
        """Number of positions of the texts, and of the inputs of each layer in a block of the denoiser."""
        pipeline = self.base.pipeline(torch.float32)
        length = sum(pipeline.texts[number].length for number in pipeline.token_order)
        if not self.in_blocks:
            return length, {}
        states = condition_of(pipeline, 1).states.shape[1]  # more than the texts have, where a T5 is left out
        return length, {name: places_in_block(pipeline, name, states) for name in self.names}

    def _kept_keys(self) -> dict[str, int]:
        """Number of retained keys of each layer whose moment is its own: layers of text encoders, and in blocks.

        Of a T5 whose padding is not read, a plan does not know the lengths of the prompts: it counts as many retained
        keys as there could be.
        """
        texts = all(TEXT_LAYER.match(name) for name in self.names)
        if not isinstance(self.module, ValueRefinement) or not (texts or self.in_blocks):
            return {}
        if isinstance(self.module, UNetFeedForwardRefinement):
            return {name: self.module.retained_items * places for name, places in self.places.items()}
        pipeline = self.base.pipeline(torch.float32)
        empty = retains_empty(pipeline) if self.module.retain_empty is None else self.module.retain_empty
        prompts = len(self.module.retain_prompts) + int(empty)
        of_part = {text.part: prompts * text.length for text in pipeline.texts}
        return {name: of_part[part_of(name)] for name in self.names}

    def _holding(self) -> Holding | None:
        """Which moments an edit holds at once, of layers with moments of their own; None for another edit."""
        if not self.kept_keys:
            return None
        return holding({name: self.shapes[name][1] for name in self.names}, self.kept_keys)

    def _passes(self) -> int:
        """Passes over what is retained that gather moments."""
        groups = len(self.holding.groups) if self.holding else 1
        return groups * self.module.rounds if groups > 1 else 1

    def _edited_keys(self, name: str) -> int:
        """Number of edited keys of the layer ``name``, if all positions of a text are edited."""
        if self.in_blocks:
            return int(self.module.num_pairs) * self.places[name]
        one = way_of(name) == "pooled" or getattr(self.module, "tokens", None) in ONE_STATE
        return self.edited * (1 if one else self.length)

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
                found["passes over the retained prompts"] = f"{self._passes():,} ({groups} groups of layers)"
            found["solves"] = f"{solves:,} (with {' and '.join(f'{width:,}' for width in inputs)} inputs)"
        if self.descends:
            steps = epochs * self._steps()
            forwards, exact = self._forwards(steps * self._batch())
            found["steps of gradient descent"] = f"{steps:,} of {self._batch()}"
            found["denoiser: forwards of one picture"] = f"{'' if exact else 'at least '}{forwards:,}"
            found["denoiser: backwards of one picture"] = f"{steps * self._batch():,}"
        elif isinstance(module, ClosedFormMethod):
            found["denoiser: forwards of one picture"] = f"{self._forwards(0)[0]:,}"
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
        if isinstance(module, UNetFeedForwardRefinement):
            return self._forwards_in_blocks(module, self._guided(pipeline, module.guidance_scale)) + uses, True
        if self.descends and type(module) in (ValueRefinement, UNetValueRefinement, MEMIT):
            rows = self._guided(pipeline, module.guidance_scale)
            drawn = module.latents_per_prompt * self.edited * module.num_inference_steps * rows
            return drawn + uses + self._goals_asked(), True
        return uses, False

    def _steps(self) -> int:
        """Steps of an epoch."""
        return int(self.module.fit_plan.steps or getattr(self.data, "steps", 1))

    def _computing(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline in the type that a mixed precision computes in."""
        precision = str(self.trainer.precision)
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        return pipeline if half is None or pipeline.dtype == half else self.base.pipeline(half)

    def _goal_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the predictions for the target prompts in one step of a descent of values."""
        pipeline = self.base.pipeline(torch.float32)
        return self._batch() * torch.Size(pipeline.latent_shape).numel() * dtype.itemsize

    def _goals_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the predictions for target prompts that a descent of values keeps."""
        if not isinstance(self.module, ValueRefinement) or self.in_blocks or self.module.epochs_per_round == 1:
            return 0
        return RoundGoals.kept(self._steps(), self._goal_bytes(dtype)) * self._goal_bytes(dtype)

    def _goals_asked(self) -> int:
        """Predictions for target prompts that a descent of values asks for: once a round, as far as they are kept."""
        computing = self._computing(self.base.pipeline(self.module.weights_dtype))
        kept = RoundGoals.kept(self._steps(), self._goal_bytes(computing.dtype))
        again = (self.module.epochs_per_round - 1) * (self._steps() - kept)
        return int(self.module.rounds * (self._steps() + again) * self._batch())

    def _forwards_in_blocks(self, module: UNetFeedForwardRefinement, rows: int) -> int:
        """Forward passes of an edit in blocks beside its descent.

        Pictures are drawn of edited and retained prompts; the goals and the edited keys, of each layer in each round,
        are read at all pairs of x_t and t, and the retained keys at theirs.
        """
        pictures = module.latents_per_prompt * self.edited + len(module.retain_prompts)
        reads = 1 + module.rounds * len(self.names) * (2 if module.start == "target" else 1)
        gathered = self._passes() * module.retained_items
        return pictures * module.num_inference_steps * rows + reads * module.num_pairs + gathered
