"""UNet-guided refinement of V1 (Algorithm 1 of the paper): the values that a closed-form edit writes into a layer.

Data flow: one epoch is one (round, layer). At its start the module gathers the layer's inputs at the edit prompts (K1)
from the model in its current state, and sets ``values`` (V1) to ``W K1``. During the epoch V1 replaces the layer's
output while the rest of the text encoder and the UNet run. It is trained by gradient descent to reduce the error
between the UNet's noise prediction and its prediction for the target prompts with the pretrained text encoder. At the
end of the epoch the recipe's ``edit`` writes V1 into the weight. The second moment of the retained prompts' inputs (K0)
is gathered once, before the first edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_unlearn.core.alignment import align_tokens, from_first_difference, positions_mask
from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.hooks import capture_inputs, replace_output
from lit_unlearn.diffusion.parameters import layer_index
from lit_unlearn.diffusion.prompts import ENCODE_BATCH
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, pairs_of
from lit_unlearn.methods.shared.editor import CHECKPOINT_KEY, check_timesteps
from lit_unlearn.methods.shared.layer_state import LayerState, per_item
from lit_unlearn.methods.shared.unet_layers import UNET_BATCH
from lit_unlearn.system.devices import for_solving


class ValueRefinement(ClosedFormMethod, ConceptEditor):
    """Finds V1 for one text-encoder layer after the other; the recipe's ``edit`` writes it.

    Args:
        rounds: How often every layer is edited; the paper edits each layer ten times and finds one round reasonable.
        first_layer: First text layer that is edited, counted from 0, or from the end if it is negative: -1 edits only
            the last one. The paper edits all except the first.
        last_layer: Last text layer that is edited, counted in the same way; null edits up to the last one.
        positions: Token positions that are edited: ``all``, ``no_bos``, ``content`` or ``eot`` (the end-of-text token
            and the padding after it).
        values: How V1 is found: ``refined`` (Algorithm 1); or, without gradient descent, ``target`` (``W K1*``, the
            paper's direct choice) or ``residual`` (``W K1`` plus this layer's share of the difference from the last
            layer's states to those of the target prompts, as in MEMIT).
        start: Where the descent of ``refined`` starts: ``output`` (``W K1``, as in the paper), ``target`` or
            ``residual``.
        pairs: Which pairs are edited: ``prompts`` (the set's pairs of edit and target prompts, as in the paper), or
            ``names`` (the bare name of the concept and that of its target, as in the authors' code).
        retain: Further prompts to retain, besides the edit prompts of the set's other concepts.
        pull: Weight of the mean squared distance of V1 from ``W K1``, relative to the noise-prediction error.
        min_timestep: Smallest timestep at which the UNet's predictions are compared.
        max_timestep: Largest timestep, exclusive.
        latents_per_prompt: Pictures of each edit prompt by the unedited model, on which predictions are compared.
        seed: Seed of these pictures, of timesteps and of noise.
        optimizer: Optimizer of V1, reset for each layer.
        edited_parameters: Group or pattern, of which only the layers from ``first_layer`` to ``last_layer`` are edited.
        **kwargs: See ``ConceptEditor``.
    """

    one_text_encoder: ClassVar[bool] = True

    def __init__(
        self,
        rounds: int = 1,
        first_layer: int = 1,
        last_layer: int | None = None,
        positions: Literal["all", "no_bos", "content", "eot"] = "all",
        values: Literal["refined", "target", "residual"] = "refined",
        start: Literal["output", "target", "residual"] = "output",
        pairs: Literal["prompts", "names"] = "prompts",
        retain: list[str] | None = None,
        pull: float = 0.0,
        min_timestep: int = 50,
        max_timestep: int = 1000,
        latents_per_prompt: int = 1,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        edited_parameters: str = "text-fc2",
        **kwargs: object,
    ) -> None:
        self.first_layer, self.last_layer = first_layer, last_layer
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        for field, value in {"rounds": rounds, "latents_per_prompt": latents_per_prompt}.items():
            if value < 1:
                raise ValueError(f"model.{field}={value} must be at least 1.")
        check_timesteps(min_timestep, max_timestep)
        self.rounds, self.positions, self.value_choice, self.pull = rounds, positions, values, pull
        self.start = start if values == "refined" else values
        self.min_timestep, self.max_timestep = min_timestep, max_timestep
        self.latents_per_prompt, self.seed, self.optimizer = latents_per_prompt, seed, optimizer
        of_concepts = [pairs_of(c) if pairs == "prompts" else [(c.names[0], c.target)] for c in self.repaired]
        self.targets_of_edited = list(zip(self.repaired, of_concepts, strict=True))
        self.edit_prompts = [text for own in of_concepts for text, _ in own]
        self.target_prompts = [into for own in of_concepts for _, into in own]
        self.num_pairs = len(self.edit_prompts)
        self.retain_prompts = self.prompts_to_retain(retain)
        self.state: LayerState | None = None
        self.errors: list[Tensor] = []  # one for each step of this layer
        self.progress = {"prepared": -1, "applied": 0}  # epoch that V1 belongs to; number of edits written
        self.retained: dict[str, Retained] = {}

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of text layers ``first_layer`` to ``last_layer`` among those that the pattern selects.

        Raises:
            ValueError: No layer is left, or a weight outside the text encoder is selected.
        """
        of_text_layers = re.compile(r"text_encoder\..*layers\.\d+\..*weight$")
        selected = self.select_only(
            names, lambda name: bool(of_text_layers.match(name)), ": only weights of text layers."
        )
        end = max(map(layer_index, selected)) + 1
        first, last = (
            end + n if n < 0 else n for n in (self.first_layer, -1 if self.last_layer is None else self.last_layer)
        )
        kept = [name for name in selected if first <= layer_index(name) <= last]
        if not kept:
            layers = sorted({layer_index(name) for name in selected})
            raise ValueError(
                f"model.first_layer={self.first_layer} and last_layer={self.last_layer} leave no layer to edit: "
                f"the pattern {self.edited_parameters!r} selects the layers {layers[0]} to {layers[-1]}."
            )
        return sorted(kept, key=layer_index)

    # --- set-up

    @property
    def current_layer(self) -> str | None:
        """Name of the weight whose V1 is being trained."""
        return self.state.name if self.state else None

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch for each round and layer; the data sets the number of steps."""
        return FitPlan(epochs=self.rounds * self.epochs_per_round, num_pairs=self.num_pairs, seed=self.seed)

    def values_shape(self) -> tuple[int, int, int]:
        """(n, L, d_out): all pairs, with the largest numbers of positions and outputs of any edited layer."""
        d_out = max(layer.out_features for layer in self.layers.values())
        return self.num_pairs, self.num_positions(), d_out

    def num_positions(self) -> int:
        """Number of positions of an edited layer: the length of a text."""
        return self.pipeline.text.length

    def own_state(self) -> list[str]:
        """V1, so that a run resumes in the middle of a layer."""
        return ["values"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store the progress of the edit, since Lightning's epoch count is ambiguous right after a layer's end."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["progress"] = dict(self.progress)
        checkpoint[CHECKPOINT_KEY]["errors"] = [float(error) for error in self.errors]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint and restore its progress."""
        super().on_load_checkpoint(checkpoint)
        self.progress = dict(checkpoint[CHECKPOINT_KEY]["progress"])
        self.errors = [torch.tensor(error) for error in checkpoint[CHECKPOINT_KEY]["errors"]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer of V1 only; without descent one that changes nothing, as Adam does in float16 (its eps is 0)."""
        return self.optimizer([self.values]) if self.value_choice == "refined" else torch.optim.SGD([self.values], 0.0)

    def on_fit_start(self) -> None:
        """Compute everything that needs the frozen model."""
        super().on_fit_start()
        text, eos = self.pipeline.text, self.pipeline.text.eos
        self.edit_ids = text.tokenize(self.edit_prompts)
        target_ids = text.tokenize(self.target_prompts)
        self.mask = positions_mask(self.edit_ids, eos, self.positions).to(self.device)
        self.alignment = torch.tensor(
            [align_tokens(e, t, eos) for e, t in zip(self.edit_ids.tolist(), target_ids.tolist(), strict=True)]
        )
        self.target_ids = target_ids
        with self.pretrained.restored(), torch.no_grad():
            self.gather()

    @property
    def epochs_per_round(self) -> int:
        """Number of epochs to edit every layer once."""
        return len(self.edited_names)

    def gather(self) -> None:
        """Compute everything that needs the unedited model; the pretrained weights are restored meanwhile."""
        self.gather_moments()
        self.goal = self.pipeline.encode_many(Tokens((self.target_ids,)))
        if self.start == "residual":
            self.goal_residual = self.align(self.stream(self.target_ids))
        if self.value_choice == "refined":
            self.latents = self.edit_latents()

    def gather_moments(self) -> None:
        """Encode the retained prompts; sum up ``K0 K0ᵀ`` (d_in, d_in), float64, and count the keys."""
        ids = self.pipeline.text.tokenize(self.retain_prompts)

        def inputs(part: Tensor) -> Mapping[str, Tensor]:
            with capture_inputs(self.layers) as captured:
                self.pipeline.text.states(part)
            return captured

        self.retained = self.retained_keys(ids.split(ENCODE_BATCH), inputs, len(ids))

    def edit_latents(self) -> Tensor:
        """Latents (latents_per_prompt, n, C, H, W) of pictures of the edit prompts, drawn by the model as it is now."""
        condition = self.pipeline.encode_many(Tokens((self.edit_ids,)))
        return torch.stack([self.pictures(condition, 100_000 * number) for number in range(self.latents_per_prompt)])

    def pictures(self, condition: Condition, first_seed: int) -> Tensor:
        """Latents (n, C, H, W) of pictures of the n prompts of ``condition``, divided among processes."""

        def make(places: list[int]) -> Tensor:
            parts = [places[start : start + UNET_BATCH] for start in range(0, len(places), UNET_BATCH)]
            seeds = [[self.seed + first_seed + place for place in part] for part in parts]
            settings = self.num_inference_steps, self.guidance_scale
            draw = self.pipeline.draw_latents
            return torch.cat([draw(condition[part], own, *settings) for part, own in zip(parts, seeds, strict=True)])

        return self.processes.made_once(len(condition), make)

    @torch.no_grad()
    def retained_outputs(self) -> list[Tensor]:
        """This process's share of outputs that should not change, float32: states (B, L, D) of retained prompts."""
        text = self.pipeline.text
        ids = text.tokenize(self.retain_prompts)
        return [text.states(part).float() for part in self.processes.own_share(ids.split(ENCODE_BATCH))]

    def retained_drift(self, before: Sequence[Tensor]) -> float:
        """Norm of the difference of ``retained_outputs`` from ``before``, relative to the norm of ``before``."""
        sums = torch.zeros(2, device=self.device)
        for old, new in zip(before, self.retained_outputs(), strict=True):
            sums += torch.stack([(new - old).square().sum(), old.square().sum()])
        moved, norm = self.processes.total(sums).sqrt()
        return float(moved / norm)

    # --- one (round, layer)

    def on_train_epoch_start(self) -> None:
        """Gather K1 of the epoch's layer and set the start of V1, with a fresh optimizer."""
        state = self.prepare_layer(self.current_epoch)
        with torch.no_grad():
            start = self.start_values(state)
            self.values.zero_()
            self.values_of(state).copy_(start)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.progress["prepared"] = self.current_epoch
        self.errors = []

    @torch.no_grad()
    def prepare_layer(self, epoch: int) -> LayerState:
        """Gather the inputs of the layer of ``epoch`` at the edit prompts, from the model as it is now."""
        self.state = self.layer_state(self.edited_names[epoch % len(self.edited_names)])
        return self.state

    def layer_state(self, name: str) -> LayerState:
        """The layer ``name`` with its inputs at the edit prompts, from the model as it is now."""
        keys = self.capture_keys(name, self.edit_ids)
        weight = self.layers[name].weight.float()
        return LayerState(name, self.layers[name], keys, keys @ weight.mT, self.mask)

    # --- writes at the end of an epoch

    def written_epochs(self) -> int:
        """Number of edits written."""
        return self.progress["applied"]

    def before_writes(self) -> None:
        """Remember the outputs of the retained prompts before the edit."""
        with self.pretrained.restored():
            self.unmoved = self.retained_outputs()

    def edits(self, epoch: int) -> Iterator[tuple[LayerState, Tensor]]:
        """Layers and V1 (n, L, d_out) to write at the end of ``epoch``; each is computed after the write before."""
        state = self.state or self.prepare_layer(epoch)
        yield state, self.values_of(state)

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """Each of ``edits`` as a group of its own."""
        for state, values in self.edits(epoch):
            weight = state.layer.weight.detach()
            keys, wished = state.edited(state.keys), state.edited(values)
            retained = self.retained[state.name]
            concept = self.concept_keys(state)
            old = for_solving(weight).clone()
            yield [Write(state.name, old, weight.dtype, keys, wished, retained, concept_keys=concept)]

    def concept_keys(self, state: LayerState) -> Tensor | None:
        """Which edited keys (m,) come from the first token on in which a prompt differs from its target; None: all."""
        return from_first_difference(self.edit_ids, self.target_ids)[state.mask.cpu()]

    def report_of(self, write: Write, report: Mapping[str, float], epoch: int) -> dict[str, Any]:
        """Also the round, and the error of the gradient descent if there was one."""
        errors = {"first_error": float(self.errors[0]), "last_error": float(self.errors[-1])} if self.errors else {}
        return {"round": epoch // self.epochs_per_round + 1, **report, **errors}

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Record the progress of the edit; at the end also how much the retained prompts' outputs have changed."""
        self.state = None
        self.progress["applied"] = epoch + 1
        if is_last:  # before the last checkpoint, which holds the report
            self.report["retained_state_drift"] = self.retained_drift(self.unmoved)
            super().after_writes(epoch, is_last)

    # --- one (round, layer), continued

    def values_of(self, state: LayerState, items: Tensor | slice = slice(None)) -> Tensor:
        """V1 (n, L, d_out) of the layer of ``state`` for the pairs ``items``, a part of ``values``."""
        _, length, d_out = state.initial.shape
        return self.values[items, :length, :d_out]

    def capture_keys(self, name: str, input_ids: Tensor) -> Tensor:
        """Inputs (n, L, d_in), float32, of the layer ``name`` for ``input_ids`` (n, L)."""
        parts = []
        for part in input_ids.split(ENCODE_BATCH):
            with capture_inputs({name: self.layers[name]}) as captured:
                self.pipeline.text.states(part)
            parts.append(captured[name].float())
        return torch.cat(parts)

    def start_values(self, state: LayerState) -> Tensor:
        """V1 (n, L, d_out) at the start of a layer; see ``start``."""
        if self.start == "target":
            return self.align(self.capture_keys(state.name, self.target_ids)) @ state.layer.weight.float().mT
        if self.start == "residual":
            missing = self.goal_residual - self.stream(self.edit_ids)
            return state.initial + missing / (len(self.edited_names) - self.edited_names.index(state.name))
        return state.initial

    def stream(self, input_ids: Tensor) -> Tensor:
        """The residual stream (n, L, D), float32, that ``residual`` compares to the goal: the last layer's output."""
        return self.pipeline.text.stream(input_ids)

    def align(self, rows: Tensor) -> Tensor:
        """Move ``rows`` of the target prompts, (n, L, D), to the edit positions that are aligned with them."""
        return rows.gather(1, self.alignment.to(rows.device).unsqueeze(-1).expand(-1, -1, rows.shape[-1]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Algorithm 1, line 3: error between the predictions for V1 and for the target prompts.

        Args:
            batch: Numbers of prompt pairs, as in ``ConceptPrompts``, (B,).
            batch_idx: Number of the step within the layer.
        """
        if self.progress["prepared"] != self.current_epoch:  # resumed between two layers: Lightning skips the hook
            self.on_train_epoch_start()
        state = self.state or self.prepare_layer(self.current_epoch)  # resumed in the middle of a layer
        pairs = batch % self.num_pairs
        values = self.values_of(state, pairs)
        if self.value_choice != "refined":
            return (values * 0).sum()  # V1 does not change
        prediction, goal = self.predictions(state, values, batch, batch_idx)
        error = F.mse_loss(prediction.float(), goal.float())
        distance = per_item((values - state.initial[pairs]).square().mean(-1), state.mask[pairs])
        self.log_losses({"train/error": error, "train/distance": distance}, batch)
        self.errors.append(self.step_losses["train/error"])
        return error + self.pull * distance

    def predictions(self, state: LayerState, values: Tensor, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Predictions for the edit prompts with V1 in place, and for the target prompts, (B, C, H, W) each."""
        pairs = batch % self.num_pairs
        latents, noise, timesteps = self.noise(batch, batch_idx)
        x_t = self.pipeline.noise.add(latents, noise, timesteps)
        with replace_output(state.layer, values, state.mask[pairs]):
            condition = self.pipeline.encode(Tokens((self.edit_ids[pairs.cpu()],)))
        with torch.no_grad():
            goal = self.pipeline.predict(x_t, timesteps, self.goal[pairs])
        return self.pipeline.predict(x_t, timesteps, condition), goal

    def noise(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents and noise (B, C, H, W) and timesteps (B,), drawn per item of the global batch.

        They depend only on seed, layer, step and item, so the loss is the same with any number of processes.
        """
        latents, noise, timesteps = [], [], []
        for item in batch.tolist():
            pair = item % self.num_pairs
            generator = seeded(self.seed, self.current_epoch, batch_idx, item)
            timesteps.append(self.pipeline.noise.draw_timestep(generator, self.min_timestep, self.max_timestep))
            number = int(torch.randint(len(self.latents), (), generator=generator))
            latents.append(self.latents[number, pair])
            noise.append(torch.randn(self.latents.shape[2:], generator=generator))
        clean = torch.stack(latents)
        return clean, torch.stack(noise).to(clean), torch.stack(timesteps).to(self.device)
