"""The pairs of edit and target prompts in the text encoders, and what edited layers read at them.

The model is read as it is at the time of a call, so what earlier edits have moved is seen. Inputs that no edit moves
are read once and kept for all rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_unlearn.core.alignment import Positions
from lit_unlearn.diffusion.hooks import begin_at
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.shared.layer_state import KeptKeys, LayerInputs, LayerState
from lit_unlearn.methods.shared.text_layers import TokenPairs, ends, inputs_of, part_of, unmoved_layers


class PairedPrompts:
    """The prompt pairs as each text encoder reads them.

    Args:
        pipeline: The pipeline.
        edit_prompts: The edit prompts, n.
        target_prompts: The target prompt of each, n.
        positions: Positions that are edited.
        layers: The edited layers by the full names of their weights.
        several_rounds: Whether each layer is edited more than once, so that inputs which no edit moves are kept.
        device: Device of the masks of edited positions.

    Attributes:
        edit_tokens: Tokens of the edit prompts for every text encoder.
        target_tokens: Tokens of the target prompts.
        by_part: The pairs of tokens by the text encoder that reads them, in the pipeline's order.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        edit_prompts: Sequence[str],
        target_prompts: Sequence[str],
        positions: Positions,
        layers: Mapping[str, nn.Linear],
        several_rounds: bool,
        device: torch.device,
    ) -> None:
        self.pipeline, self.layers, self.several_rounds = pipeline, layers, several_rounds
        self.edit_tokens = pipeline.tokenize(edit_prompts)
        self.target_tokens = pipeline.tokenize(target_prompts)
        tokens = zip(pipeline.texts, self.edit_tokens.ids, self.target_tokens.ids, strict=True)
        self.by_part = {
            text.part: TokenPairs.of(text, edit, target, positions, device) for text, edit, target in tokens
        }
        self.kept = KeptKeys()

    @property
    def first(self) -> TokenPairs:
        """The pairs for the first text encoder."""
        return self.by_part[self.pipeline.texts[0].part]

    @property
    def of_states(self) -> list[TokenPairs]:
        """The pairs for the text encoders whose positions follow one another in ``Condition.states``."""
        return [self.by_part[self.pipeline.texts[number].part] for number in self.pipeline.token_order]

    def of_layer(self, name: str) -> TokenPairs:
        """The pairs for the text encoder that the layer ``name`` belongs to."""
        return self.by_part[part_of(name)]

    def forget(self) -> None:
        """Drop all inputs that are kept."""
        self.kept = KeptKeys()

    def keys(self, name: str, input_ids: Tensor) -> Tensor:
        """Inputs (n, L, d_in), float32, of the layer ``name`` for its encoder's ``input_ids`` (n, L)."""
        return self._read(name, input_ids).keys

    def _read(
        self, name: str, input_ids: Tensor, stream_after: int | None = None, with_before: bool = False
    ) -> LayerInputs:
        """As ``inputs_of``; what is kept has no stream."""

        def compute(input_ids: Tensor) -> LayerInputs:
            text = self.of_layer(name).text
            return inputs_of(text, name, self.layers[name], input_ids, stream_after, with_before)

        return self.kept.of(name, input_ids, compute) if self.keeps(name) else compute(input_ids)

    def keeps(self, name: str) -> bool:
        """Whether the inputs of the layer ``name`` are kept for further rounds, since no edit moves them."""
        return self.several_rounds and name in unmoved_layers(list(self.layers))

    def target_keys(self, name: str) -> Tensor:
        """K1* (n, L, d_in), float32: the target prompts' inputs, each at the edit position aligned with it."""
        pairs = self.of_layer(name)
        return pairs.align(self.keys(name, pairs.target_ids))

    def state(
        self, name: str, only_end: bool, stream_after: int | None = None, with_before: bool = False
    ) -> LayerState:
        """The layer ``name`` with its inputs at the edit prompts.

        Args:
            name: Full name of its weight.
            only_end: Whether it acts on nothing except at the end of a text. Then only that position is edited, and
                counts as often as a text has positions.
            stream_after: Number of the layer after which the residual stream is read, too; None: it is not.
            with_before: Whether a descent follows, whose steps begin at the layer (``begun``).
        """
        pairs = self.of_layer(name)
        read = self._read(name, pairs.edit_ids, stream_after, with_before)
        stream = read.stream
        if stream is None and stream_after is not None:
            stream = pairs.text.stream(pairs.edit_ids, stream_after)
        state = LayerState(name, self.layers[name], read.keys, pairs.mask, before=read.before, stream=stream)
        if only_end:
            state.mask, state.weight = ends(pairs.edit_ids, pairs.text).to(state.keys.device), pairs.text.length
        self.kept.share_rows(state)
        return state

    @contextmanager
    def begun(self, state: LayerState, pairs: Tensor) -> Iterator[None]:
        """Within it, the encoder of ``state`` reads the edit prompts numbered ``pairs`` (B,) from ``state.before`` on.

        Where that is not known, it reads them from the beginning. In a mixed precision the layers before have computed
        in the type of the weights, as for the keys.
        """
        block = self.of_layer(state.name).text.block_of(state.name)
        if state.before is None or block is None:
            yield
            return
        with begin_at(*block, state.before[pairs]):
            yield

    def tokens_read(self, name: str) -> Tokens:
        """What the text encoders read while V1 of the layer ``name`` is found.

        That is the edit prompts; but in the other encoders that are edited the target prompts, as if their edit was
        done.
        """
        others = {part_of(edited) for edited in self.layers} - {part_of(name)}
        pairs = self.by_part.values()
        return Tokens(tuple(own.target_ids if own.text.part in others else own.edit_ids for own in pairs))
