"""The edit of text encoders, and the refinement of its values (Algorithm 1 of the paper): what is written into a layer.

Data flow: one epoch is one (round, layer); the layers of an encoder come one after the other, and so do the encoders of
a model. At the start of an epoch the module gathers the layer's inputs at the edit prompts (K1), as that encoder's
tokenizer cuts them, from the model in its current state, and sets ``values`` (V1) to ``W K1``, ``W K1*`` or to ``W K1``
plus the layer's share of what is missing where the encoder is read (``values``, ``start``). During the epoch V1
replaces the layer's output while the rest of the encoder and the denoiser run. It is trained by gradient descent to
reduce the error between the denoiser's prediction, of noise or of a velocity, and its prediction for the target prompts
with the pretrained text encoders, which is asked for once a round (``RoundGoals``). The other encoders that are edited
read the target prompts meanwhile, as if their edit was done, so that no encoder makes up for another; those that are
not edited read the edit prompts. At the end of the epoch the recipe's ``edit`` writes V1 into the weight. The second
moments of the retained prompts' inputs (K0) of all layers are gathered once, before the first edit, or in groups of
layers where they do not fit (``RetainedLayers``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.hooks import replace_output
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, pairs_of
from lit_unlearn.methods.shared.editor import check_timesteps
from lit_unlearn.methods.shared.layer_state import LayerState, per_item
from lit_unlearn.methods.shared.noised import RoundGoals, edit_latents, noise_of_items
from lit_unlearn.methods.shared.paired_prompts import PairedPrompts
from lit_unlearn.methods.shared.retained_groups import RetainedGroups
from lit_unlearn.methods.shared.retained_layers import RetainedLayers
from lit_unlearn.methods.shared.retained_texts import drift, encoder_outputs
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.methods.shared.text_layers import Stretch, select_text_layers, stretches
from lit_unlearn.system.names import check_numbers


class ValueRefinement(ClosedFormMethod, ConceptEditor):
    r"""Finds V1 for one text-encoder layer after the other; the recipe's ``edit`` writes it.

    Args:
        rounds: How often every layer is edited; the paper edits each layer ten times and finds one round reasonable.
        first_layer: First layer of each text encoder that is edited, counted from 0. A negative number counts from the
            last layer whose states the denoiser reads: -1 edits only that one, and the one behind it if it acts on the
            pooled vector. The paper edits all except the first.
        last_layer: Last text layer that is edited, counted in the same way; null edits up to the last one.
        positions: Token positions that are edited: ``all``, ``no_bos``, ``content`` or ``eot`` (the end-of-text token
            and the padding after it). In a last layer that acts on the pooled vector alone, only the position where
            that is read, the end-of-text token, is edited and retained; it counts as often as a text has positions.
        values: How V1 is found: ``refined`` (Algorithm 1); or, without gradient descent, ``target`` (``W K1*``, the
            paper's direct choice) or ``residual`` (``W K1`` plus this layer's share of the difference from the states
            where the encoder is read to those of the target prompts, as in MEMIT).
        start: Where the descent of ``refined`` starts: ``output`` (``W K1``, as in the paper), ``target`` or
            ``residual``.
        pairs: Which pairs are edited: ``prompts`` (the set's pairs of edit and target prompts, as in the paper), or
            ``names`` (the bare name of the concept and that of its target, as in the authors' code).
        retain: Further prompts to retain, besides the edit prompts of the set's other concepts.
        retain_empty: Also retain the empty prompt, with the weight of all retained prompts together, since
            classifier-free guidance uses it with each of them; null does so in models with several text encoders or
            with a T5, which reads in both directions.
        pull: Weight of the mean squared distance of V1 from ``W K1``, relative to the noise-prediction error.
        min_timestep: Smallest timestep at which the UNet's predictions are compared.
        max_timestep: Largest timestep, exclusive.
        latents_per_prompt: Pictures of each edit prompt by the unedited model, on which predictions are compared.
        seed: Seed of these pictures, of timesteps and of noise.
        optimizer: Optimizer of V1, reset for each layer.
        edited_parameters: Group or pattern, of which only the layers from ``first_layer`` to ``last_layer`` are edited:
            ``text-fc2``, in all text encoders; or a part, such as ``text_encoder_2\..*fc2\.weight`` for a single one,
            ``mlp\.fc2\.weight`` for all CLIPs, ``DenseReluDense\.wo\.weight`` for a T5.
        **kwargs: See ``ConceptEditor``.
    """

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
        retain_empty: bool | None = None,
        pull: float = 0.0,
        min_timestep: int = 50,
        max_timestep: int = 1000,
        latents_per_prompt: int = 1,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        edited_parameters: str = "text-fc2",
        **kwargs: object,
    ) -> None:
        self.first_layer, self.last_layer, self.positions = first_layer, last_layer, positions
        self.start = start if values == "refined" else values
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        check_numbers("model", rounds=rounds, latents_per_prompt=latents_per_prompt)
        check_timesteps(min_timestep, max_timestep)
        self.rounds, self.value_choice, self.pull = rounds, values, pull
        self.min_timestep, self.max_timestep = min_timestep, max_timestep
        self.latents_per_prompt, self.seed, self.optimizer = latents_per_prompt, seed, optimizer
        of_concepts = [pairs_of(c) if pairs == "prompts" else [(c.names[0], c.target)] for c in self.repaired]
        self.targets_of_edited = list(zip(self.repaired, of_concepts, strict=True))
        self.edit_prompts = [text for own in of_concepts for text, _ in own]
        self.target_prompts = [into for own in of_concepts for _, into in own]
        self.num_pairs = len(self.edit_prompts)
        self.retain_prompts, self.retain_empty = self.prompts_to_retain(retain), retain_empty
        self.state: LayerState | None = None
        self.errors: list[Tensor] = []  # one for each step of this layer
        self.progress = {"prepared": -1, "applied": 0}  # epoch that V1 belongs to; number of edits written
        self.retained: dict[str, Retained] = {}
        self.retained_layers: RetainedGroups
        self.unmoved: list[Tensor] = []
        self.round_goals = RoundGoals()

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of text layers ``first_layer`` to ``last_layer`` among those that the pattern selects.

        Raises:
            ValueError: No layer of a text encoder is left, a weight outside the text layers is selected, or one for
                which ``positions`` or ``start`` is not possible.
        """
        return select_text_layers(self, names)

    # --- set-up

    @property
    def current_layer(self) -> str | None:
        """Name of the weight whose V1 is being trained."""
        return self.state.name if self.state else None

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch for each round and layer; the data sets the number of steps."""
        return FitPlan(epochs=self.rounds * self.epochs_per_round, num_pairs=self.num_pairs, seed=self.seed)

    def values_shape(self) -> tuple[int, ...]:
        """(n, L, d_out): all pairs, with the largest numbers of positions and outputs of any edited layer."""
        d_out = max(layer.out_features for layer in self.layers.values())
        return self.num_pairs, self.num_positions(), d_out

    def num_positions(self) -> int:
        """Largest number of positions of an edited layer: the length of a text."""
        return max(text.length for text in self.pipeline.texts)

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
        self.state = None  # an interrupted fit of this module may have left one
        self.paired = PairedPrompts(
            self.pipeline,
            self.edit_prompts,
            self.target_prompts,
            self.positions,
            self.layers,
            several_rounds=self.rounds > 1,
            device=self.device,
        )
        self.unmoved = []
        with self.pretrained.restored(), torch.no_grad():
            self.gather()

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The edited layers by the places where their text encoders are read."""
        names = self.base.names or list(self.pipeline.named_parameters())
        return stretches(self.edited_names, names, self.base.read_after)

    def stretch_of(self, name: str) -> Stretch:
        """The stretch of the layer ``name``."""
        return next(stretch for stretch in self.stretches if name in stretch.names)

    @property
    def needs_goal(self) -> bool:
        """Whether the condition for the target prompts is read: by the descent only."""
        return self.value_choice == "refined"

    @property
    def epochs_per_round(self) -> int:
        """Number of epochs to edit every layer once."""
        return len(self.edited_names)

    @property
    def current_round(self) -> int:
        """Number of the round, from 0."""
        return self.current_epoch // self.epochs_per_round

    def gather(self) -> None:
        """Compute everything that needs the unedited model; the pretrained weights are restored meanwhile."""
        self.gather_moments()
        self.round_goals = RoundGoals()
        if self.needs_goal:
            self.goal = self.pipeline.encode_many(self.paired.target_tokens)
        if self.start == "residual":
            self.goal_residuals = {stretch: self.target_stream(stretch) for stretch in self.stretches}
        if self.value_choice == "refined":
            self.latents = edit_latents(self)

    def gather_moments(self) -> None:
        """Encode the retained prompts; sum up ``K0 K0ᵀ`` (d_in, d_in), float64, and count the keys.

        The same forward passes give the outputs that should not change. Where the moments of all layers are too much
        to be held at once, only those of the layers that are written first are gathered (``RetainedLayers``).
        """
        self.retained_layers = layers = RetainedLayers(self)
        self.retained = layers.of(self.first_written(self.progress["applied"]))
        self.unmoved = layers.outputs

    def first_written(self, epoch: int) -> str:
        """Name of the weight that is written first at the end of ``epoch``."""
        return self.edited_names[epoch % len(self.edited_names)]

    @torch.no_grad()
    def retained_outputs(self) -> list[Tensor]:
        """This process's share of outputs that should not change, float32: what the denoiser reads, by default."""
        return encoder_outputs(self)

    # --- one (round, layer)

    def on_train_epoch_start(self) -> None:
        """Gather K1 of the epoch's layer and set the start of V1, with a fresh optimizer."""
        state = self.prepare_layer(self.current_epoch)
        with torch.no_grad():
            start = self.start_values(state)
            self.values.zero_()
            self.values_of(state).copy_(start)
        state.stream = None
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
        stretch = self.stretch_of(name)
        after = self.stream_after(stretch) if self.reads_stream else None
        return self.paired.state(name, name in stretch.only_end, after, with_before=self.value_choice == "refined")

    # --- writes at the end of an epoch

    def written_epochs(self) -> int:
        """Number of edits written."""
        return self.progress["applied"]

    def before_writes(self) -> None:
        """Remember the outputs of the retained prompts before the edit, unless ``gather_moments`` has seen them."""
        if not self.unmoved:
            with self.pretrained.restored():
                self.unmoved = self.retained_outputs()

    def edits(self, epoch: int) -> Iterator[tuple[LayerState, Tensor | None]]:
        """Layers and V1 (n, L, d_out) to write at the end of ``epoch``; each is computed after the write before.

        V1 is None where it is the output of ``LayerState.anchors``.
        """
        state = self.state or self.prepare_layer(epoch)
        state.before = None
        yield state, self.values_of(state)

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """Each of ``edits`` as a group of its own."""
        for state, values in self.edits(epoch):
            if state.name not in self.retained:
                self.retained = {}  # released before others are gathered
                with self.pretrained.restored():
                    self.retained = self.retained_layers.of(state.name)
            write = state.write(values, self.retained[state.name], self.concept_keys(state))
            yield [replace(write, shared=write.shared and len(self.retained) == len(self.layers))]
            del write  # it holds the retained keys, and others may be gathered next

    def concept_keys(self, state: LayerState) -> Tensor | None:
        """Which edited keys (m,) can have seen the concept, see ``TokenPairs.carrying``; None: all."""
        return state.edited(self.paired.of_layer(state.name).carrying().to(state.mask.device))

    def report_of(self, write: Write, report: Mapping[str, float], epoch: int) -> dict[str, Any]:
        """Also the round, and the error of the gradient descent if there was one."""
        errors = {"first_error": float(self.errors[0]), "last_error": float(self.errors[-1])} if self.errors else {}
        return {"round": epoch // self.epochs_per_round + 1, **report, **errors}

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Record the progress of the edit; at the end also how much the retained prompts' outputs have changed."""
        self.state = None
        self.progress["applied"] = epoch + 1
        if is_last:  # before the last checkpoint, which holds the report
            self.paired.forget()
            self.round_goals = RoundGoals()
            self.report["retained_state_drift"] = drift(self.unmoved, self.retained_outputs(), self.processes)
            super().after_writes(epoch, is_last)

    # --- one (round, layer), continued

    def values_of(self, state: LayerState, items: Tensor | slice = slice(None)) -> Tensor:
        """V1 (n, L, d_out) of the layer of ``state`` for the pairs ``items``, a part of ``values``."""
        return self.values[items, : state.keys.shape[1], : state.layer.out_features]

    def start_values(self, state: LayerState) -> Tensor:
        """V1 (n, L, d_out) at the start of a layer; see ``start``."""
        if self.start == "target":
            return self.paired.target_keys(state.name) @ state.layer.weight.float().mT
        if self.start == "residual":
            stretch = self.stretch_of(state.name)
            assert state.stream is not None
            missing = self.goal_residuals[stretch] - state.stream
            return state.initial + missing / (len(stretch.names) - stretch.names.index(state.name))
        return state.initial

    @property
    def reads_stream(self) -> bool:
        """Whether each layer is given the residual stream of the edit prompts, too."""
        return self.start == "residual"

    def stream_after(self, stretch: Stretch) -> int:
        """The layer after which the residual stream is compared to its goal: where the encoder is read."""
        return stretch.read_after

    def target_stream(self, stretch: Stretch) -> Tensor:
        """The stream of the target prompts, (n, L, D), float32, at the edit positions that are aligned with them."""
        pairs = self.paired.by_part[stretch.part]
        return pairs.align(pairs.text.stream(pairs.target_ids, self.stream_after(stretch)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Algorithm 1, line 3: error between the predictions for V1 and for the target prompts.

        Args:
            batch: Numbers of prompt pairs, as in ``ConceptPrompts``, (B,).
            batch_idx: Number of the step within the layer.
        """
        with torch.autocast(self.device.type, enabled=False):  # a resumed fit: as where Lightning begins an epoch
            if self.progress["prepared"] != self.current_epoch:  # between two layers it skips the hook
                self.on_train_epoch_start()
            elif self.state is None and self.value_choice == "refined":  # in the middle of a layer
                self.prepare_layer(self.current_epoch).stream = None
        if self.value_choice != "refined":
            return self.values.flatten()[0] * 0  # V1 does not change
        state = self.state
        assert state is not None
        pairs = batch % self.num_pairs
        values = self.values_of(state, pairs)
        prediction, goal = self.predictions(state, values, batch, batch_idx)
        error = F.mse_loss(prediction.float(), goal.float())
        distance = per_item((values - state.initial[pairs]).square().mean(-1), state.mask[pairs])
        self.log_losses({"train/error": error, "train/distance": distance}, batch)
        self.errors.append(self.step_losses["train/error"])
        return error + self.pull * distance

    def predictions(self, state: LayerState, values: Tensor, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Predictions for the edit prompts with V1 and for their targets, (B, C, H, W); see ``PairedPrompts.begun``."""
        pairs = batch % self.num_pairs
        latents, noise, timesteps = self.noise(batch, batch_idx)
        x_t = self.pipeline.noise.add(latents, noise, timesteps)
        with replace_output(state.layer, values, state.mask[pairs]), self.paired.begun(state, pairs):
            condition = self.pipeline.encode(self.paired.tokens_read(state.name)[pairs.cpu()])
        goal = self.goal_prediction(x_t, timesteps, batch, batch_idx)
        return self.pipeline.predict(x_t, timesteps, condition), goal

    def goal_prediction(self, x_t: Tensor, timesteps: Tensor, batch: Tensor, batch_idx: int) -> Tensor:
        """What the model predicted for the target prompts before any edit, (B, C, H, W); once for all of a round."""
        asked = partial(self.pretrained_prediction, x_t, timesteps, self.goal[batch % self.num_pairs])
        if self.epochs_per_round == 1:
            return asked()
        return self.round_goals.of(self.current_round, batch_idx, batch, asked)

    def noise(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents and noise (B, C, H, W) and timesteps (B,), drawn per item of the global batch.

        They depend only on seed, round, step and item, so the loss is the same with any number of processes.
        """
        return noise_of_items(self, self.latents, batch, batch_idx)
