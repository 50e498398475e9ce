"""How a model reads prompts: ids of tokens, learned tokens, and the condition that its denoiser gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.discrete_prompts import shared_words, words_of
from lit_unlearn.diffusion.prompts import ENCODE_BATCH, PromptReader
from lit_unlearn.diffusion.text import TextEncoder, Tokens


class ReadsText(ABC):
    """The text side of a pipeline; a family says which encoders it has and how their states become a condition."""

    skips: ClassVar[tuple[str, ...]] = ()
    """The text encoders that clip skip reads earlier (``clip_skip``); none in families without it."""
    clip_skip: int | None = None
    """How many layers before the model's own prompts are read; None for the model's own."""

    @property
    def unskipped(self) -> Self:
        """The pipeline without clip skip, which reads what guidance leads away from."""
        return self if self.clip_skip is None else replace(self, clip_skip=None)  # type: ignore[type-var]

    def unconditional(self) -> Condition:
        """The condition, of one row, that guidance leads away from: that of the empty prompt."""
        return self.unskipped.encode([""])

    @property
    @abstractmethod
    def texts(self) -> tuple[TextEncoder, ...]:
        """The text encoders, each with its tokenizer."""

    @abstractmethod
    def condition(self, tokens: Tokens) -> Condition:
        """The condition for prompts, with one forward pass of each text encoder."""

    @property
    def reader(self) -> PromptReader:
        """Reads prompts as the text encoders do."""
        return PromptReader(*zip(*((text.tokenizer, text.length, text.part) for text in self.texts), strict=True))

    def read_positions(self, tokens: Tokens) -> Tensor | None:
        """Positions of the states of ``tokens`` that the denoiser reads, (B, L) bool; None for all."""
        return None

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """``prompts`` as each text encoder reads them; warns of prompts that are cut off."""
        return Tokens(tuple(text.tokenize(prompts) for text in self.texts))

    def tokenize_templates(self, templates: Sequence[str], count: int) -> Tokens:
        """As ``tokenize``, for templates in which every ``{}`` stands for ``count`` learned tokens."""
        ids, slots = zip(*(text.tokenize_templates(templates, count) for text in self.texts), strict=True)
        return Tokens(ids, slots)

    # A learned token is new in every text encoder. Its embeddings in them lie side by side, each divided by the size of
    # its encoder's vocabulary relative to that of the first, so that one learning rate suits all: those of a T5 are
    # much larger than those of a CLIP.

    @property
    def token_widths(self) -> list[int]:
        """Widths of the text encoders' embeddings, whose sum D is that of a learned token."""
        return [text.table.shape[1] for text in self.texts]

    @cached_property
    def token_scales(self) -> list[float]:
        """Size (root mean square) of each text encoder's embeddings, relative to that of the first one's."""
        if len(self.texts) == 1:
            return [1.0]
        sizes = [text.vocabulary_norm / text.table.shape[1] ** 0.5 for text in self.texts]
        return [size / sizes[0] for size in sizes]

    @property
    def vocabulary_norms(self) -> list[float]:
        """Mean norm of each text encoder's embeddings, in the units of learned tokens."""
        return [text.vocabulary_norm / scale for text, scale in zip(self.texts, self.token_scales, strict=True)]

    def initial_embeddings(self, count: int, words: str | None, generator: torch.Generator) -> Tensor:
        """Initial embeddings (count, D), float32, of learned tokens; see ``TextEncoder.initial_embeddings``."""
        found = [text.initial_embeddings(count, words, generator) for text in self.texts]
        return torch.cat([own / scale for own, scale in zip(found, self.token_scales, strict=True)], dim=1)

    def encode(self, prompts: Sequence[str] | Tokens, embeddings: Tensor | None = None) -> Condition:
        """The condition for ``prompts``, in one forward pass.

        Args:
            prompts: Texts, or tokens from ``tokenize``.
            embeddings: Embeddings of the learned tokens in them, (n, D); gradients flow into them.
        """
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenize(prompts)
        if embeddings is None:
            return self.condition(tokens)
        parts = embeddings.split(self.token_widths, dim=1)
        with ExitStack() as stack:
            for text, own, scale, slots in zip(self.texts, parts, self.token_scales, tokens.slots, strict=True):
                stack.enter_context(text.learned(own * scale, slots))
            return self.condition(tokens)

    def whole_words(self, forbidden: Callable[[str], object] | None = None, phrases: Sequence[str] = ()) -> Tensor:
        """Words that are one token for every text encoder, as their ids (A, E) in each; see ``shared_words``."""
        return shared_words([text.tokenizer for text in self.texts], forbidden, phrases)

    def words_of(self, words: Tensor) -> str:
        """The text of words (k, E) from ``whole_words``."""
        return words_of(self.texts[0].tokenizer, words[:, 0].tolist())

    def encode_mixtures(self, weights: Tensor, allowed: Tensor, tokens: Tokens) -> Condition:
        """As ``encode``, with learned tokens that are mixtures of vocabulary tokens; gradients flow into ``weights``.

        Args:
            weights: Weight of each allowed token in each learned token, (k, A).
            allowed: Ids of the allowed tokens in each of E text encoders, (A, E).
            tokens: Tokens from ``tokenize_templates``.
        """
        found = []
        for text, ids, scale in zip(self.texts, allowed.unbind(1), self.token_scales, strict=True):
            rows = text.table.detach()[ids.to(text.table.device)].to(weights)
            found.append(weights @ rows / scale)
        return self.encode(tokens, torch.cat(found, dim=1))

    def encode_many(self, prompts: Sequence[str] | Tokens) -> Condition:
        """As ``encode``, in batches if there are many prompts."""
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenize(prompts)
        return Condition.cat([self.condition(part) for part in tokens.split(ENCODE_BATCH)])
