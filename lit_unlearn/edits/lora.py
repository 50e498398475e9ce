"""An edit as a low-rank change of each layer, with the names under which diffusers loads LoRA weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.diffusion.stored import OLD_PREFIX

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for in a folder."""
AUTO_RESIDUAL = 1e-3
"""Largest part of a layer's change that rank ``auto`` leaves out, in the Frobenius norm."""
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Layers of a text encoder for which diffusers accepts LoRA weights."""


def fits_lora(name: str, value: Tensor) -> bool:
    """Whether diffusers can hold a change of the weight ``name`` as LoRA: linear layers and convolutions."""
    layer, _, kind = name.rpartition(".")
    if kind != "weight" or value.dim() not in (2, 4):
        return False
    return name.startswith("unet.") or layer.endswith(TEXT_LAYERS)


def parse_rank(text: str) -> int | None:
    """A rank, or None for ``auto``.

    Raises:
        ValueError: It is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise ValueError(f"lora={text!r} must be a rank of at least 1, or auto.")
    return int(text)


def low_rank(
    edited: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rank: int | None,
    dtype: torch.dtype = torch.float32,
    old_names: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factors of the change of each weight: the truncated SVD ``W - W0 = U S V^T``, split as ``B = U S``, ``A = V^T``.

    No matrix of the rank of B A is nearer to the change (Eckart and Young 1936). All layers are given the same rank,
    filled up with zeros where fewer are needed or possible: a loader scales a layer by alpha / rank, and not all of
    them keep the two equal when layers differ.

    Args:
        edited: New weights by full name, each (out, in) or (out, in, height, width).
        base: Their values in the base model.
        rank: The largest rank, or None for the smallest whose residual is at most ``AUTO_RESIDUAL`` in every layer.
        dtype: Type of the factors.
        old_names: Put ``text_model.`` before the layers of the text encoder, as transformers 4 names them.

    Returns:
        The factors ``...lora_A.weight`` (rank, in[, height, width]) and ``...lora_B.weight`` (out, rank[, 1, 1]), and
        facts: ``rank``, and by weight ``residual`` (norm of what is missing over that of the change, with the
        factors as written) and ``needed_rank`` (for ``AUTO_RESIDUAL``).

    Raises:
        ValueError: A weight is of another kind, such as a bias or an embedding.
    """
    if others := [name for name, value in edited.items() if not fits_lora(name, value)]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"lora: the edit changes {others[0]}{more}, which LoRA cannot hold (only linear layers and "
            "convolutions): use --delta, or export the folder."
        )
    parts, needed = {}, {}
    for name, value in edited.items():
        change = (value.double() - base[name].double()).flatten(1)
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        # left[k]: norm of what the first k directions leave out
        left = torch.cat([s.square().flip(0).cumsum(0).flip(0).sqrt(), s.new_zeros(1)])
        needed[name] = int((left > AUTO_RESIDUAL * left[0]).sum())
        parts[name] = (u * s, vh, change)
    most = max(vh.shape[0] for _, vh, _ in parts.values())
    used = max(1, max(needed.values()) if rank is None else min(rank, most))
    factors, residual = {}, {}
    for name, (us, vh, change) in parts.items():
        value = edited[name]
        b, a = value.new_zeros(len(us), used, dtype=dtype), value.new_zeros(used, vh.shape[1], dtype=dtype)
        kept = min(used, needed[name] if rank is None else used, len(vh))
        b[:, :kept], a[:kept] = us[:, :kept].to(dtype), vh[:kept].to(dtype)
        missing = (change - b.double() @ a.double()).norm()
        residual[name] = float(missing / change.norm()) if change.any() else 0.0
        part, _, layer = name.removesuffix(".weight").partition(".")
        prefix = OLD_PREFIX.get(part, "") if old_names else ""
        kernel = value.shape[2:]
        factors[f"{part}.{prefix}{layer}.lora_A.weight"] = a.reshape(used, value.shape[1], *kernel)
        factors[f"{part}.{prefix}{layer}.lora_B.weight"] = b.reshape(len(b), used, *(1 for _ in kernel))
    return factors, {"rank": used, "residual": residual, "needed_rank": needed}
