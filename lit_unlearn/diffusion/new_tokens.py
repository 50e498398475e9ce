"""New tokens outside the vocabulary: their embeddings replace those of placeholders while a prompt is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_unlearn.diffusion.prompts import frame, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLACE = "{}"
"""Marks the position of the new tokens in a template."""


def tokenize_templates(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], count: int, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokenize prompts in which every ``{}`` stands for a sequence of ``count`` new tokens.

    Args:
        tokenizer: The tokenizer.
        templates: B prompts.
        count: Number of new tokens.
        length: Number of tokens L; None takes the tokenizer's ``model_max_length``.

    Returns:
        ``input_ids`` (B, L), padded, with an arbitrary token of the vocabulary at the new
        tokens' positions; and ``slots`` (B, L): the index of the new token at each position, -1 at other positions.

    Raises:
        ValueError: A template is too long.
    """
    length = tokenizer.model_max_length if length is None else length
    special, (begin, end) = set(tokenizer.all_special_ids), frame(tokenizer)
    placeholder = next(number for number in range(len(tokenizer)) if number not in special)
    all_ids, all_slots = [], []
    for template in templates:
        first, *rest = token_ids(tokenizer, template.split(PLACE))
        ids, slots = list(first), [-1] * len(first)
        for text in rest:
            ids += [placeholder] * count + text
            slots += [*range(count), *[-1] * len(text)]
        if (needed := len(begin) + len(ids) + len(end)) > length:
            raise ValueError(
                f"The prompt {template!r} has {needed} tokens with {count} new ones for each {PLACE}, and the text "
                f"encoder reads {length}: shorten it or learn fewer."
            )
        padding = length - needed
        all_ids.append([*begin, *ids, *end, *[tokenizer.pad_token_id] * padding])
        all_slots.append([*[-1] * len(begin), *slots, *[-1] * (len(end) + padding)])
    return torch.tensor(all_ids, device="cpu"), torch.tensor(all_slots, device="cpu")


@contextmanager
def substitute_embeddings(text_encoder: PreTrainedModel, embeddings: Tensor, slots: Tensor) -> Iterator[None]:
    """Within the block, the text encoder reads ``embeddings`` (n, D) at the positions given by ``slots`` (B, L).

    For calls with ``input_ids`` (B, L). The vocabulary and its table are not changed; gradients flow into
    ``embeddings``.
    """

    def substitute(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        places = slots.to(output.device)
        new = embeddings.to(output)[places.clamp_min(0)]  # (B, L, D)
        return torch.where((places >= 0).unsqueeze(-1), new, output)

    handle = token_table(text_encoder).register_forward_hook(substitute)
    try:
        yield
    finally:
        handle.remove()


def initial_embeddings(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    count: int,
    words: str | None,
    generator: torch.Generator,
) -> Tensor:
    """Initial embeddings (count, D), float32.

    They are the embeddings of the tokens of ``words``, repeated as needed; without words, normal noise with the
    vocabulary's mean and standard deviation.
    """
    table = token_table(text_encoder).weight.detach().float()
    if words is None:
        noise = torch.randn(count, table.shape[1], generator=generator, device=generator.device).to(table.device)
        return table.mean(0) + table.std(0) * noise
    (ids,) = token_ids(tokenizer, [words])
    return table[[ids[place % len(ids)] for place in range(count)]].clone()


def vocabulary_norm(text_encoder: PreTrainedModel) -> float:
    """Mean norm of the embeddings of the vocabulary; about 0.4 in Stable Diffusion 1.x."""
    return float(token_table(text_encoder).weight.detach().float().norm(dim=1).mean())


def read_embeddings(path: str | Path) -> tuple[Tensor, Mapping[str, str]]:
    """Read learned embeddings (n, D), float32, and their metadata: ``concept``, ``vocabulary``.

    Raises:
        ValueError: The file is missing, corrupt, or does not contain learned embeddings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"embeddings={path} does not exist: `lit-unlearn fit --config textual_inversion` makes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            embeddings = file.get_tensor("embeddings") if names == ["embeddings"] else None
    except SafetensorError as error:
        raise ValueError(f"embeddings={path} is corrupt or no safetensors ({error}): make it again.") from error
    if embeddings is None or embeddings.ndim != 2 or not {"concept", "vocabulary"} <= set(metadata):
        raise ValueError(
            f"embeddings={path} was not made by textual_inversion.yaml: it lacks embeddings, concept or vocabulary."
        )
    return embeddings.float(), metadata


def token_table(text_encoder: PreTrainedModel) -> nn.Embedding:
    """The layer that embeds the vocabulary."""
    # A T5 has another layer with the same weight, which is not called.
    called = getattr(getattr(text_encoder, "encoder", None), "embed_tokens", None)
    table = text_encoder.get_input_embeddings() if called is None else called
    assert isinstance(table, nn.Embedding)
    return table
