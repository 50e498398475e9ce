"""MEMIT (Meng et al., 2023): one goal for the residual stream, spread over the edited layers.

Data flow: one epoch is one round. During it a goal z for the residual stream after the *last* edited layer is found by
gradient descent, as V1 of that layer is in ``ValueRefinement``. At its end every layer is written, from first to last.
Each layer takes its share of the distance from the stream to z, measured again after all earlier layers are written.
Where several text encoders are edited, or one that is read at two places (``text_layers``), each of these stretches of
layers has a z and an epoch of its own, one after the other.
With ``LeastSquares`` as the recipe's ``edit`` this is MEMIT; with ``NullSpace`` it is AlphaEdit as published for
language models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.diffusion.parameters import layer_index
from lit_unlearn.methods.shared.layer_state import LayerState, per_item
from lit_unlearn.methods.shared.text_layers import Stretch
from lit_unlearn.methods.value_refinement import ValueRefinement


class MEMIT(ValueRefinement):
    """Finds a goal for the residual stream and spreads the change over the layers; a ``ClosedFormEdit`` writes it.

    Layer i of L (from 0) gets ``V1 = W K1 + (z - z_i) / (L - i)``, where ``z_i`` is the stream after the last edited
    layer of the stretch, with all layers before i already written.

    Args:
        max_shift: Largest ``||z - z_0|| / ||z_0||`` at any position, where ``z_0`` is the stream at the start of the
            round; the reference uses 0.75, null sets no bound.
        shift_penalty: Weight of the mean of ``||z - z_0|| / ||z_0||^2`` over the positions, added to the error of the
            noise prediction; the reference uses 0.5, with a language model's log-likelihood.
        **kwargs: See ``ValueRefinement``. ``values`` and ``start`` refer to z: ``refined`` finds it by gradient
            descent, ``residual`` takes the stream of the target prompts itself.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(self, max_shift: float | None = None, shift_penalty: float = 0.0, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if max_shift is not None and not max_shift > 0:
            raise ValueError(f"model.max_shift={max_shift} must be positive, or null for no bound.")
        if not shift_penalty >= 0:
            raise ValueError(f"model.shift_penalty={shift_penalty} must be zero or larger.")
        self.max_shift, self.shift_penalty = max_shift, shift_penalty

    @property
    def epochs_per_round(self) -> int:
        """One for each stretch of layers, whose layers are all written at its end."""
        return len(self.stretches)

    def first_written(self, epoch: int) -> str:
        """The first layer of the stretch of ``epoch``."""
        return self.stretches[epoch % len(self.stretches)].names[0]

    @property
    def reads_stream(self) -> bool:
        """Always: z is a goal for it."""
        return True

    def stream_after(self, stretch: Stretch) -> int:
        """The last edited layer of ``stretch``."""
        return layer_index(stretch.names[-1])

    def on_train_epoch_start(self) -> None:
        """Start the round's z within its bound; if it starts from the beginning, with a fresh optimizer."""
        super().on_train_epoch_start()
        self.bound()

    @torch.no_grad()
    def prepare_layer(self, epoch: int) -> LayerState:
        """The last edited layer of the stretch of ``epoch``, and the stream after it, from the model as it is now."""
        stretch = self.stretches[epoch % len(self.stretches)]
        self.state = self.layer_state(stretch.names[-1])
        assert self.state.stream is not None
        self.initial_stream = self.state.stream
        return self.state

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Algorithm 1, line 3, for the last edited layer, and the penalty on the shift of its stream."""
        loss = super().training_step(batch, batch_idx)
        if not self.shift_penalty or self.value_choice != "refined":
            return loss
        assert self.state is not None
        pairs = batch % self.num_pairs
        shift = (self.values_of(self.state, pairs) - self.state.initial[pairs]).norm(dim=-1)
        relative = shift / self.initial_stream[pairs].square().sum(-1)
        return loss + self.shift_penalty * per_item(relative, self.state.mask[pairs])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and keep z within its bound, before a checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        self.bound()

    @torch.no_grad()
    def bound(self) -> None:
        """Shorten ``z - z_0``, position by position, to ``max_shift`` times the length of ``z_0``."""
        if self.max_shift is None:
            return
        assert self.state is not None
        values, initial = self.values_of(self.state), self.state.initial
        shift = values - initial
        length = self.max_shift * self.initial_stream.norm(dim=-1, keepdim=True)
        values.copy_(initial + shift * (length / shift.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1))

    def edits(self, epoch: int) -> Iterator[tuple[LayerState, Tensor]]:
        """Each layer with its V1 (n, L, d_out): its share of z minus the stream, after the layer before is written."""
        state = self.state or self.prepare_layer(epoch)
        goal = self.initial_stream + self.values_of(state) - state.initial  # z: the layer adds its output to the stream
        state.before = None
        stretch = self.stretch_of(state.name)
        for place, name in enumerate(stretch.names):
            state = self.paired.state(name, name in stretch.only_end, self.stream_after(stretch))
            assert state.stream is not None
            missing = goal - state.stream
            yield state, state.initial + missing / (len(stretch.names) - place)
