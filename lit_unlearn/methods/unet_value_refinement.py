"""The null-space edit in the denoiser instead of the text encoder (the paper's ablation): what reads text, or the FFN.

Data flow: as in ``ValueRefinement`` one epoch is one (round, layer), V1 replaces the layer's output and is trained to
reduce the error between two predictions, and a ``ClosedFormEdit`` callback writes it. Here the text encoders do not
change, and the goal is the prediction of the denoiser with its pretrained weights for the target prompts.

``UNetValueRefinement`` edits the maps that read text first (``text_ways``): ``attn2.to_k`` and ``attn2.to_v`` of a
UNet, ``context_embedder`` of a transformer, and the map of the pooled vector. Their inputs are what the text encoders
give, the same in every round. ``UNetFeedForwardRefinement`` edits layers whose inputs also depend on x_t and t, so a
few pairs of x_t and t are fixed for each prompt: ``ff.net.2``, whose inputs are at the picture's positions, and
``add_k_proj`` and ``add_v_proj`` of joint attention, whose inputs are at the text's, mixed with the picture by the
blocks before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.hooks import capture_inputs, replace_output
from lit_unlearn.diffusion.parameters import call_order
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.text_ways import way_of
from lit_unlearn.methods.shared.layer_state import LayerState
from lit_unlearn.methods.shared.noised import drawn, edit_latents, noised
from lit_unlearn.methods.shared.retained_blocks import RetainedBlocks
from lit_unlearn.methods.shared.text_maps import by_way, flattened, select_first_maps
from lit_unlearn.methods.shared.unet_layers import (
    OF_PICTURE,
    OF_TEXT,
    Query,
    StatePairs,
    Watched,
    check_choices,
    places_in_block,
    query_batches,
    select_in_blocks,
)
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.names import check_numbers

RETAINED_SEED = 20_000_000
"""Added to the seeds of pictures of retained prompts, so that they differ from the edit prompts' seeds."""


class UNetValueRefinement(ValueRefinement):
    """Finds V1 for one map that reads text first after the other, in the order in which the denoiser calls them.

    Args:
        edited_parameters: Group or pattern of such maps: ``xattn-kv`` of a UNet, or ``context`` of any family.
        values: How V1 is found: ``refined`` (Algorithm 1); or, without gradient descent, ``target`` (``W K1*`` of the
            unedited denoiser).
        start: Where the descent of ``refined`` starts: ``output`` (``W K1``) or ``target`` (``W K1*``).
        retain_empty: Also retain the empty prompt, with the weight of all retained prompts together, since
            classifier-free guidance uses it with each of them.
        watched_prompts: Number of retained prompts, spread over the set, to measure ``retained_state_drift`` on.
        **kwargs: See ``ValueRefinement``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        edited_parameters: str = "xattn-kv",
        values: Literal["refined", "target"] = "refined",
        start: Literal["output", "target"] = "output",
        retain_empty: bool = True,
        watched_prompts: int = 24,
        **kwargs: object,
    ) -> None:
        check_choices(type(self).__name__, values, start, watched_prompts)
        super().__init__(
            edited_parameters=edited_parameters,
            values=values,
            start=start,
            first_layer=0,
            last_layer=None,
            **kwargs,  # type: ignore[arg-type]
        )
        self.retain_empty, self.watched_prompts = retain_empty, watched_prompts

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights that the pattern selects, in the order in which the denoiser calls them.

        Raises:
            ValueError: It selects another weight.
        """
        return sorted(select_first_maps(self, names), key=call_order)

    def num_positions(self) -> int:
        """Number of positions of the states."""
        return sum(self.pipeline.texts[number].length for number in self.pipeline.token_order)

    # --- set-up

    @property
    def is_direct(self) -> bool:
        """Whether V1 is what the unedited denoiser gives for the target prompts: then it is never computed."""
        return self.value_choice == "target"

    def values_shape(self) -> tuple[int, ...]:
        """As in ``ValueRefinement``; a single number if V1 is not computed."""
        return () if self.is_direct else super().values_shape()

    def own_state(self) -> list[str]:
        """V1, if it is computed."""
        return [] if self.is_direct else super().own_state()

    @property
    def epochs_per_round(self) -> int:
        """One if V1 is not computed: nothing that a map reads or gets depends on another map's edit."""
        return 1 if self.is_direct else super().epochs_per_round

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in ``ValueRefinement``; a checkpoint that holds V1 though it is not computed is of an earlier version.

        Raises:
            ValueError: Such a fit cannot go on, since its epochs were others.
        """
        super().on_load_checkpoint(checkpoint)
        older = self.is_direct and checkpoint["state_dict"].pop("values", None) is not None
        if older and self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                "The checkpoint is of an earlier version, whose fit had an epoch for each map: begin it again with "
                "--fresh."
            )

    @property
    def needs_goal(self) -> bool:
        """Always: V1 is made from the target prompts' states, too."""
        return True

    def gather(self) -> None:
        """Compute everything that needs the unedited model; the pretrained weights are restored meanwhile."""
        self.edit_condition = self.pipeline.encode_many(self.paired.edit_tokens)
        self.edit_keys = self.inputs(self.edit_condition)
        # Of each way, one tensor for all maps and rounds.
        self.edited_keys: dict[str, Tensor] = {}
        self.edited_anchors: dict[str, Tensor] = {}
        self.state_pairs = StatePairs.of(self.paired.of_states, self.num_positions())
        super().gather()
        self.watched = Watched.of(self, self.watched_prompts)

    def inputs(self, condition: Condition) -> dict[str, Tensor]:
        """What the maps of each way read, (n, L, d_in) float32: of a pooled vector L is 1."""
        return {way: found.float() for way, found in self.pipeline.first_inputs(condition).items()}

    def retained_inputs(self, pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the maps of each way read of ``prompts``, (m, d_in)."""
        tokens = pipeline.tokenize(prompts)
        return flattened(pipeline, tokens, pipeline.first_inputs(pipeline.encode_many(tokens)))

    def gather_moments(self) -> None:
        """Sum up ``K0 K0ᵀ`` (d_in, d_in), float64, and count the keys: the retained prompts' inputs on each way."""
        retained = self.retained_inputs(self.pipeline, self.retain_prompts)
        empty = self.retained_inputs(self.pipeline.unskipped, [""]) if self.retain_empty else {}
        for way, names in by_way(self.edited_names).items():
            states = retained[way]
            moment, count, longest = second_moment(states).cpu(), len(states), largest_norm(states)
            if empty:
                rows, weight = empty[way], len(self.retain_prompts)
                moment, count = moment + weight * second_moment(rows).cpu(), count + weight * len(rows)
                longest = max(longest, largest_norm(rows))
            own = Retained(moment, count, prompts=len(self.retain_prompts), largest_norm=longest)
            self.retained |= dict.fromkeys(names, own)

    def retained_outputs(self) -> list[Tensor]:
        """This process's share of what an edit should leave, float32: predictions (B, C, H, W) for watched prompts."""
        return self.watched.predictions()

    # --- one (round, layer)

    def layer_state(self, name: str) -> LayerState:
        """The layer ``name`` with its inputs at the edit prompts, the text states or the pooled vectors."""
        way = str(way_of(name))
        keys, mask = self.edit_keys[way], self.state_pairs.mask
        state = LayerState(name, self.layers[name], keys, torch.ones_like(mask[:, :1]) if way == "pooled" else mask)
        if way not in self.edited_keys:
            self.edited_keys[way] = state.edited(keys)
        state.rows = self.edited_keys[way]
        if self.is_direct:
            if way not in self.edited_anchors:
                self.edited_anchors[way] = state.edited(self.target_keys(name))
            state.anchors, state.anchor_weight = self.edited_anchors[way], self.pretrained.values[name]
        return state

    def concept_keys(self, state: LayerState) -> Tensor | None:
        """Which edited keys (m,) can have seen the concept, see ``StatePairs``; None: all, as every pooled vector."""
        if way_of(state.name) == "pooled":
            return None
        return state.edited(self.state_pairs.carrying.to(state.mask.device))

    def start_values(self, state: LayerState) -> Tensor:
        """V1 (n, L, d_out) at the start of a layer; see ``start``."""
        return started(self, state)

    def target_keys(self, name: str) -> Tensor:
        """K1* (n, L, d_in), float32: the target prompts' inputs, states each at the edit position aligned with it."""
        found = self.inputs(self.goal)[str(way_of(name))]
        return found if way_of(name) == "pooled" else self.state_pairs.align(found)

    def on_train_epoch_start(self) -> None:
        """As in ``ValueRefinement``, if there is a V1 to find."""
        if self.is_direct:
            self.progress["prepared"] = self.current_epoch
        else:
            super().on_train_epoch_start()

    def edits(self, epoch: int) -> Iterator[tuple[LayerState, Tensor | None]]:
        """As in ``ValueRefinement``; all maps, without V1, if it is that of the target prompts."""
        if self.is_direct:
            yield from ((self.layer_state(name), None) for name in self.edited_names)
        else:
            yield from super().edits(epoch)

    def predictions(self, state: LayerState, values: Tensor, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Predictions for the edit prompts with V1, and of the unedited denoiser for the target prompts."""
        pairs = batch % self.num_pairs
        latents, noise, timesteps = self.noise(batch, batch_idx)
        x_t = self.pipeline.noise.add(latents, noise, timesteps)
        goal = self.goal_prediction(x_t, timesteps, batch, batch_idx)
        with replace_output(state.layer, values, state.mask[pairs]):
            return self.pipeline.predict(x_t, timesteps, self.edit_condition[pairs]), goal


class UNetFeedForwardRefinement(ValueRefinement):
    """Finds V1 for one layer of a transformer block after the other: ``ff.net.2``, or K and V of joint attention.

    ``ff.net.2`` is the second linear layer of the FFN, in a UNet or a transformer; ``add_k_proj`` and ``add_v_proj``
    make keys and values of the text. The inputs of these layers depend on x_t and t, so V1 is found at a few pairs of
    them, fixed for each prompt. A key is the input at one position of a picture, or of the text.

    Args:
        edited_parameters: Group or pattern of weights of ``ff.net.2``, ``add_k_proj`` and ``add_v_proj``.
        noises_per_prompt: Number of pairs of x_t and t at which each edit prompt is edited.
        noises_per_retained_prompt: Number of pairs of x_t and t, from the prompt's own pictures, at which each retained
            prompt is retained.
        values: As in ``UNetValueRefinement``.
        start: As in ``UNetValueRefinement``.
        retain_empty: As in ``UNetValueRefinement``.
        watched_prompts: As in ``UNetValueRefinement``.
        **kwargs: See ``ValueRefinement``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        edited_parameters: str = r"^(unet|transformer)\..*\.ff\.net\.2\.weight$",
        noises_per_prompt: int = 4,
        noises_per_retained_prompt: int = 1,
        values: Literal["refined", "target"] = "refined",
        start: Literal["output", "target"] = "output",
        retain_empty: bool = True,
        watched_prompts: int = 24,
        **kwargs: object,
    ) -> None:
        check_choices(type(self).__name__, values, start, watched_prompts)
        check_numbers(
            "model", noises_per_prompt=noises_per_prompt, noises_per_retained_prompt=noises_per_retained_prompt
        )
        super().__init__(
            edited_parameters=edited_parameters,
            positions="all",
            values=values,
            start=start,
            first_layer=0,
            last_layer=None,
            **kwargs,  # type: ignore[arg-type]
        )
        self.retain_empty, self.watched_prompts = retain_empty, watched_prompts
        self.noises_per_prompt, self.noises_per_retained_prompt = noises_per_prompt, noises_per_retained_prompt
        self.num_pairs = noises_per_prompt * len(self.edit_prompts)  # item = number of the noise * prompts + prompt

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights that the pattern selects, in the order in which the denoiser calls them.

        Raises:
            ValueError: It selects another weight.
        """
        return select_in_blocks(self, names, (OF_PICTURE, *OF_TEXT))

    # --- set-up

    def num_positions(self) -> int:
        """Largest number of positions of any edited layer."""
        length = self.pipeline.unconditional().states.shape[1]
        return max(places_in_block(self.pipeline, name, length) for name in self.edited_names)

    @property
    def retained_items(self) -> int:
        """Number of inputs of the denoiser at which layers are retained: forwards of a pass over them."""
        return len(self.retain_prompts) * self.noises_per_retained_prompt * (1 + bool(self.retain_empty))

    @property
    def needs_goal(self) -> bool:
        """Always: the prediction to reach is made from it."""
        return True

    def gather(self) -> None:
        """Also fix x_t and t of every item, and the prediction to reach there."""
        self.edit_condition = self.pipeline.encode_many(self.paired.edit_tokens)
        self.state_pairs = StatePairs.of(self.paired.of_states, self.edit_condition.states.shape[1])
        super().gather()
        self.watched = Watched.of(self, self.watched_prompts)
        latents = self.latents if self.value_choice == "refined" else edit_latents(self)
        numbers = [number % len(latents) for number in range(self.noises_per_prompt)]
        self.noisy, self.timesteps = noised(self, latents[numbers].flatten(0, 1), "edited")
        self.goals = self.asked(self.goal, lambda query: self.pipeline.predict(*query))

    def asked(self, condition: Condition, answer: Callable[[Query], Tensor]) -> Tensor:
        """Results (n, ...) of ``answer`` for all items, whose prompts have the rows of ``condition`` in turn."""

        def make(places: list[int]) -> Tensor:
            items = torch.tensor(places)
            own = query_batches(self.noisy[items], self.timesteps[items], condition[items % len(condition)])
            return torch.cat([answer(query) for query in own])

        return self.processes.made_once(len(self.noisy), make)

    def gather_moments(self) -> None:
        """Pass pictures of retained prompts through the denoiser; sum up ``K0 K0ᵀ``, float64, and count the keys.

        Where the moments of all layers are too much to be held at once, only those of the layers that are written
        first are gathered, and the others by further passes over the same pictures (``RetainedBlocks``).
        """
        retained = self.pipeline.encode_many(self.retain_prompts)
        latents = drawn(self, retained, RETAINED_SEED)
        noisy, timesteps = noised(self, latents.repeat(self.noises_per_retained_prompt, 1, 1, 1), "retained")
        conditions = [retained]
        if self.retain_empty:
            conditions.append(self.pipeline.unskipped.encode_many([""]))
        self.retained_layers = RetainedBlocks(self, noisy, timesteps, conditions, len(self.retain_prompts))
        self.retained = self.retained_layers.of(self.first_written(self.progress["applied"]))

    def retained_outputs(self) -> list[Tensor]:
        """This process's share of what an edit should leave, float32: predictions (B, C, H, W) for watched prompts."""
        return self.watched.predictions()

    # --- one (round, layer)

    def layer_state(self, name: str) -> LayerState:
        """The layer ``name`` with its inputs at the items, from the denoiser as it is now."""
        keys = self.keys_at(name, self.edit_condition)
        mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        return LayerState(name, self.layers[name], keys, mask)

    def concept_keys(self, state: LayerState) -> Tensor | None:
        """All, since a key is an input that picture and prompt are mixed in."""
        return None

    def keys_at(self, name: str, condition: Condition) -> Tensor:
        """Inputs (n, places, d_in), float32, of the layer ``name`` at the items with the prompts of ``condition``."""

        def read(query: Query) -> Tensor:
            with capture_inputs({name: self.layers[name]}) as captured, torch.no_grad():
                self.pipeline.predict(*query)
            return captured[name].float()

        return self.asked(condition, read)

    def start_values(self, state: LayerState) -> Tensor:
        """V1 (n, places, d_out) at the start of a layer; see ``start``."""
        return started(self, state)

    def target_keys(self, name: str) -> Tensor:
        """K1* (n, places, d_in), float32: as ``keys_at``, unedited, for the target prompts; states of texts aligned."""
        with self.pretrained.restored():
            found = self.keys_at(name, self.goal)
        if not name.endswith(OF_TEXT):
            return found
        prompts = len(self.edit_prompts)
        return torch.cat([self.state_pairs.align(part) for part in found.split(prompts)])

    def predictions(self, state: LayerState, values: Tensor, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Predictions for the edit prompts with V1, and of the unedited denoiser for the target prompts."""
        items = batch % self.num_pairs
        condition = self.edit_condition[items % len(self.edit_condition)]
        with replace_output(state.layer, values, state.mask[items]):
            prediction = self.pipeline.predict(self.noisy[items], self.timesteps[items], condition)
        return prediction, self.goals[items]


def started(method: UNetValueRefinement | UNetFeedForwardRefinement, state: LayerState) -> Tensor:
    """V1 (n, L, d_out) where the descent starts: the layer's output, or the unedited one for the target prompts."""
    if method.start != "target":
        return state.initial
    return method.target_keys(state.name) @ method.pretrained.values[state.name].to(state.keys).mT
