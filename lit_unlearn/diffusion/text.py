"""A text encoder with its tokenizer, and the tokens of prompts.

tokens = pipeline.tokenize(prompts)      # Tokens: input_ids of every text encoder
text.states(input_ids)                   # the states that the denoiser attends to, (B, L, D)
text.stream(input_ids, layer)            # the residual stream after a layer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.concept_tokens import names_mask
from lit_unlearn.diffusion.new_tokens import (
    initial_embeddings,
    substitute_embeddings,
    token_table,
    tokenize_templates,
    vocabulary_norm,
)
from lit_unlearn.diffusion.prompts import encode, residual_stream, token_ids, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """The tokens of B prompts for each text encoder of a pipeline, one row per prompt.

    Attributes:
        ids: For each text encoder, ``input_ids`` (B, L).
        slots: For each text encoder, the index of the learned token at each position, (B, L), -1 for none; empty if no
            prompt has learned tokens.
    """

    ids: tuple[Tensor, ...]
    slots: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.ids[0])

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Tokens:
        return Tokens(tuple(ids[rows] for ids in self.ids), tuple(slots[rows] for slots in self.slots))

    def split(self, size: int) -> Iterator[Tokens]:
        """Parts of ``size`` rows; the last one may have fewer."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline and its tokenizer.

    Attributes:
        part: Its name among the parts of the pipeline.
        model: ``input_ids`` (B, L) to states (B, L, D).
        tokenizer: Byte-pair tokenizer of a CLIP, or unigram tokenizer of a T5.
        layer: Number of the hidden states that the denoiser attends to, counted from the last (-1), without a final
            norm; None for the last ones after the final norm.
        positions: Number of positions that the encoder reads, L; None takes the tokenizer's ``model_max_length``.
        masked: Whether nothing reads the padding behind a text: neither the encoder nor the denoiser.
        normed: Whether the final norm of a CLIP follows the hidden states ``layer`` all the same.
    """

    part: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int | None = None
    positions: int | None = None
    masked: bool = False
    normed: bool = False

    @property
    def length(self) -> int:
        """Number of positions that the encoder reads, L."""
        return int(self.tokenizer.model_max_length if self.positions is None else self.positions)

    @property
    def eos(self) -> int:
        """Id of the end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def begins(self) -> bool:
        """Whether every prompt begins with a token of its own, as CLIP's do and T5's do not."""
        return self.tokenizer.bos_token_id is not None

    @property
    def causal(self) -> bool:
        """Whether a state depends only on the tokens up to its position, as in CLIP and not in T5."""
        return self.begins

    @property
    def table(self) -> Tensor:
        """Embeddings of the vocabulary, (tokens, D); the parameter itself, not a copy."""
        return token_table(self.model).weight

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """``input_ids`` (B, L), padded; warns of prompts that are cut off."""
        return tokenize(self.tokenizer, prompts, self.length, self.part)

    def tokenize_templates(self, templates: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``slots`` (B, L) of templates in which every ``{}`` stands for ``count`` learned tokens."""
        return tokenize_templates(self.tokenizer, templates, count, self.length)

    def words(self, text: str) -> list[int]:
        """Ids of the tokens of ``text``, without the tokens that begin and end a prompt."""
        return token_ids(self.tokenizer, [text])[0]

    def names_of(self, tokens: Sequence[int]) -> list[str]:
        """The tokens as text, as they are in the vocabulary."""
        return list(self.tokenizer.convert_ids_to_tokens(list(tokens)))

    def reads(self, input_ids: Tensor) -> Tensor:
        """Positions of ``input_ids`` (B, L) that are read, (B, L) bool: all, or without padding if it is masked."""
        if not self.masked:
            return torch.ones_like(input_ids, dtype=torch.bool)
        text = input_ids != self.tokenizer.pad_token_id
        return text.flip(-1).cumsum(-1).flip(-1) > 0  # up to the last token that is not padding

    def _attention_mask(self, input_ids: Tensor) -> Tensor | None:
        if not self.masked or input_ids.is_meta:  # transformers asks for the values of a mask; a plan has none
            return None
        return self.reads(input_ids).to(self.model.device)

    def states(self, input_ids: Tensor) -> Tensor:
        """States (B, L, D) for ``input_ids`` (B, L), which the denoiser attends to."""
        if self.layer is None:
            return encode(self.model, input_ids, self._attention_mask(input_ids))
        return self.read(input_ids)[0]

    def read(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """States (B, L, D) and the pooled vectors (B, P) for ``input_ids`` (B, L), from one forward pass.

        The pooled vectors of a ``CLIPTextModelWithProjection`` are ``text_embeds``, those of a ``CLIPTextModel`` are
        ``pooler_output``; a T5 has none.
        """
        output = self.model(
            input_ids.to(self.model.device),
            attention_mask=self._attention_mask(input_ids),
            output_hidden_states=self.layer is not None,
        )
        pooled = output.get("text_embeds", output.get("pooler_output"))
        states = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return self.model.get_submodule("final_layer_norm")(states) if self.normed else states, pooled

    def stream(self, input_ids: Tensor, layer: int | None = None) -> Tensor:
        """The residual stream (n, L, D), float32, after a layer, before any final norm.

        Args:
            input_ids: Tokens, (n, L).
            layer: Number of the layer, from 0 or, counted from the last, -1; None for the last one whose output the
                denoiser attends to.
        """
        if layer is None:
            layer = -1 if self.layer is None else self.layer
        return residual_stream(self.model, input_ids, layer, self._attention_mask(input_ids))

    def block_of(self, name: str) -> tuple[nn.Module, int] | None:
        """What runs a CLIP's layers, and the number of the first that must run again when a layer's output changes.

        That is the layer with the weight ``name`` (its full name); or, with clip skip, the one whose input the denoiser
        reads, if it comes before. None for a T5, whose layers also hand on the biases of positions.
        """
        match = re.match(r"[^.]+\.(.*)\.layers\.(\d+)\.", name)
        if match is None:
            return None
        stack, number = self.model.get_submodule(match[1]), int(match[2])
        layers = stack.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        return stack, number if self.layer is None else min(number, len(layers) + 1 + self.layer)

    @contextmanager
    def learned(self, embeddings: Tensor, slots: Tensor) -> Iterator[None]:
        """Within the block, the encoder reads ``embeddings`` (n, D) at the positions given by ``slots`` (B, L)."""
        with substitute_embeddings(self.model, embeddings, slots):
            yield

    def initial_embeddings(self, count: int, words: str | None, generator: torch.Generator) -> Tensor:
        """Initial embeddings (count, D), float32: those of ``words``, or noise distributed like the vocabulary."""
        return initial_embeddings(self.tokenizer, self.model, count, words, generator)

    @property
    def vocabulary_norm(self) -> float:
        """Mean norm of the embeddings of the vocabulary."""
        return vocabulary_norm(self.model)

    def names_mask(self, prompts: Sequence[str], occurrences: Callable[[str], Sequence[tuple[int, int]]]) -> Tensor:
        """Marks the tokens of places found by ``occurrences`` in each prompt, (B, L) bool; see ``concept_tokens``."""
        return names_mask(self.tokenizer, prompts, occurrences, self.length)


CLIP_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
T5_SETTINGS = (
    *("feed_forward_proj", "layer_norm_epsilon", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)


def text_settings(config: Any) -> dict[str, str]:
    """Fields of a text encoder's configuration that change its output without changing its weights."""
    return {name: str(getattr(config, name)) for name in (T5_SETTINGS if config.model_type == "t5" else CLIP_SETTINGS)}


def plain_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration of diffusers without its metadata, such as the version."""
    return {name: str(value) for name, value in config.items() if name == "_class_name" or not name.startswith("_")}


def linear_layers(module: nn.Module, endings: tuple[str, ...]) -> list[nn.Module]:
    """The layers of ``module`` whose names end with one of ``endings``, in order."""
    return [layer for name, layer in module.named_modules() if name.endswith(endings)]
