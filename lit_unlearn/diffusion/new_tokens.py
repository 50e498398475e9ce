"""Tokens that no vocabulary has: their embeddings stand in for those of placeholders while a prompt is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.prompts import token_ids
from lit_unlearn.diffusion.source import resolve_model, weight_files

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PLACE = "{}"
"""Where a template has the new tokens."""


def tokenize_templates(tokenizer: CLIPTokenizer, templates: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Tokenize prompts in which every ``{}`` stands for ``count`` new tokens, one after the other.

    Returns:
        ``input_ids`` (B, L), padded to ``model_max_length``, with some token of the vocabulary at the new tokens'
        positions; and ``slots`` (B, L): the number of the new token at each position, -1 where there is none.

    Raises:
        ValueError: A template is too long.
    """
    length, special = tokenizer.model_max_length, set(tokenizer.all_special_ids)
    placeholder = next(number for number in range(len(tokenizer)) if number not in special)
    all_ids, all_slots = [], []
    for template in templates:
        first, *rest = token_ids(tokenizer, template.split(PLACE))
        ids, slots = list(first), [-1] * len(first)
        for text in rest:
            ids += [placeholder] * count + text
            slots += [*range(count), *[-1] * len(text)]
        if (needed := len(ids) + 2) > length:
            raise ValueError(
                f"The prompt {template!r} has {needed} tokens with {count} new ones for each {PLACE}, and the text "
                f"encoder reads {length}: shorten it or learn fewer."
            )
        padding = length - needed
        all_ids.append([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding])
        all_slots.append([-1, *slots, -1, *[-1] * padding])
    return torch.tensor(all_ids, device="cpu"), torch.tensor(all_slots, device="cpu")


@contextmanager
def substitute_embeddings(text_encoder: CLIPTextModel, embeddings: Tensor, slots: Tensor) -> Iterator[None]:
    """Let the text encoder read ``embeddings`` (n, D) at the positions that ``slots`` (B, L) gives them.

    For calls with ``input_ids`` (B, L). The vocabulary and its table stay as they are; gradients flow into
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
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, count: int, words: str | None, generator: torch.Generator
) -> Tensor:
    """Embeddings (count, D), float32, to start from.

    Those of the tokens of ``words``, in turn; without words, normal noise with mean and spread of the vocabulary's.
    """
    table = token_table(text_encoder).weight.detach().float()
    if words is None:
        noise = torch.randn(count, table.shape[1], generator=generator, device=generator.device).to(table.device)
        return table.mean(0) + table.std(0) * noise
    (ids,) = token_ids(tokenizer, [words])
    return table[[ids[place % len(ids)] for place in range(count)]].clone()


def vocabulary_norm(text_encoder: CLIPTextModel) -> float:
    """Mean norm of the embeddings of the vocabulary; about 0.4 in Stable Diffusion 1.x."""
    return float(token_table(text_encoder).weight.detach().float().norm(dim=1).mean())


def vocabulary_of(model: str) -> tuple[str, int | None]:
    """What embeddings learned for ``model`` belong to, without loading it.

    Returns:
        The fingerprint of its vocabulary's embeddings, and their width. Of a hub id: the id, and None.

    Raises:
        ValueError: ``model`` is neither a folder nor shaped like a hub id.
    """
    path = resolve_model(model)
    if isinstance(path, str):
        return path, None
    for file in weight_files(path, "text_encoder"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith("token_embedding.weight"):
                    table = tensors.get_tensor(name).float()
                    return fingerprint({"token_embedding.weight": table}), table.shape[1]
    raise ValueError(f"model={model!r} has no token_embedding.weight in text_encoder/: copy it again.")


def read_embeddings(path: str | Path) -> tuple[Tensor, Mapping[str, str]]:
    """Read learned embeddings (n, D), float32, and what is said of them: ``concept``, ``vocabulary``.

    Raises:
        ValueError: The file is missing, corrupt, or holds something else.
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


def token_table(text_encoder: CLIPTextModel) -> nn.Embedding:
    """The embeddings of the vocabulary."""
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table
