"""Turns an edit into a low-rank change of each layer, with the weight names that other programs expect for LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_unlearn.diffusion.lora_names import STABLE_DIFFUSION, LoraNames

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for in a folder."""
AUTO_RESIDUAL = 1e-3
"""Largest part of a layer's change that rank ``auto`` may leave out, in the Frobenius norm."""
NOTABLE_RESIDUAL = 0.05
"""If more than this part of a layer's change is left out, the user is warned."""


Rank = int | Literal["exact"] | None
"""The largest rank; ``exact`` for the rank of the change itself; None for ``auto``."""


def parse_rank(text: str) -> Rank:
    """A rank, ``exact``, or None for ``auto``.

    Raises:
        ValueError: ``text`` is neither a rank nor one of these words.
    """
    if text == "auto":
        return None
    if text == "exact":
        return "exact"
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise ValueError(f"lora={text!r} must be a rank of at least 1, exact, or auto.")
    return int(text)


def low_rank(
    edited: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rank: Rank,
    dtype: torch.dtype = torch.float32,
    names: LoraNames = STABLE_DIFFUSION,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factors of the change of each weight: the truncated SVD ``W - W0 = U S V^T``, split as ``B = U S``, ``A = V^T``.

    No other matrix of this rank is closer to the change (Eckart and Young 1936). All layers get the same rank, filled
    up with zeros where a smaller rank is enough or the largest possible, and alpha equal to the rank: loaders scale a
    layer by alpha / rank, and some get this wrong if the layers have different ranks.

    Args:
        edited: New weights by full name, each (out, in) or (out, in, height, width).
        base: Their values in the base model.
        rank: The largest rank; None for the smallest whose residual is at most ``AUTO_RESIDUAL`` in every layer; or
            ``exact`` for the smallest that leaves out no more than the rounding of the stored weights. A closed form
            that maps n states has an exact rank of n at most.
        dtype: Type of the factors.
        names: How the factors are named.

    Returns:
        For each layer A (rank, in[, height, width]), B (out, rank[, 1, 1]), and with kohya's names alpha (). And a
        report: ``names`` (``kohya`` or ``diffusers``), ``rank``, ``notable_rank`` (the smallest rank with which no
        layer misses more than ``NOTABLE_RESIDUAL``), and for each weight ``residual`` (norm of the missing part divided
        by the norm of the change, with the factors as written) and ``needed_rank`` (the rank needed for
        ``AUTO_RESIDUAL``).

    Raises:
        ValueError: diffusers does not read LoRA weights of a weight, such as a bias or an embedding; or the exact rank
            is so large that the factors would have as many numbers as the weights.
    """
    _check_readable(edited, names)
    parts, needed, notable = {}, {}, {}
    for name, value in edited.items():
        change = (value.double() - base[name].double()).flatten(1)
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        # left[k]: norm of the part that the first k directions leave out
        left = torch.cat([s.square().flip(0).cumsum(0).flip(0).sqrt(), s.new_zeros(1)])
        # W0 + change was rounded to the weight's type: an error of at most half a unit of each number.
        rounding = torch.finfo(value.dtype).eps / 2 * value.double().norm()
        needed[name] = int((left > (rounding if rank == "exact" else AUTO_RESIDUAL * left[0])).sum())
        notable[name] = int((left > NOTABLE_RESIDUAL * left[0]).sum())
        parts[name] = (u * s, vh, change)
    most = max(vh.shape[0] for _, vh, _ in parts.values())
    used = max(1, min(rank, most) if isinstance(rank, int) else max(needed.values()))
    if rank == "exact":
        _check_smaller(used, [value.flatten(1).shape for value in edited.values()])
    factors: dict[str, Tensor] = {}
    residual = {}
    for name, (us, vh, change) in parts.items():
        b, a = change.new_zeros(len(us), used, dtype=dtype), change.new_zeros(used, vh.shape[1], dtype=dtype)
        kept = min(used, used if isinstance(rank, int) else needed[name], len(vh))
        b[:, :kept], a[:kept] = us[:, :kept].to(dtype), vh[:kept].to(dtype)
        missing = (change - b.double() @ a.double()).norm()
        residual[name] = float(missing / change.norm()) if change.any() else 0.0
        factors |= _layer(names, name, b, a, tuple(edited[name].shape[2:]))
    for unchanged, like in names.companions(edited).items():
        rows, columns = edited[like].shape
        b, a = torch.zeros(rows, used, dtype=dtype), torch.zeros(used, columns, dtype=dtype)
        factors |= _layer(names, unchanged, b, a, ())
    report = {"names": names.naming, "rank": used, "notable_rank": max(notable.values())}
    return factors, {**report, "residual": residual, "needed_rank": needed}


def _check_readable(edited: Mapping[str, Tensor], names: LoraNames) -> None:
    """Refuse weights that diffusers would not read from LoRA weights with these ``names``."""
    others = [name for name, value in edited.items() if not names.fits(name, value)]
    if not others:
        return
    found = f"{others[0]} and {len(others) - 1} more" if len(others) > 1 else others[0]
    own = LoraNames.of("diffusers", ())
    if all(own.fits(name, value) for name, value in edited.items()):
        raise ValueError(
            f"lora: the edit changes {found}, which diffusers does not read by kohya's names: pass --lora_names "
            "diffusers, use --delta, or export the folder."
        )
    raise ValueError(
        f"lora: the edit changes {found}, which LoRA cannot hold (only linear layers and convolutions of a UNet or a "
        "transformer, and linear layers of a CLIP): use --delta, or export the folder."
    )


def _check_smaller(rank: int, shapes: Sequence[Sequence[int]]) -> None:
    """Refuse a rank with which the factors of matrices of these ``shapes`` would not be smaller than the matrices."""
    if rank * sum(rows + columns for rows, columns in shapes) >= sum(rows * columns for rows, columns in shapes):
        raise ValueError(
            f"lora='exact' needs rank {rank}, with which the file would be as large as the weights themselves: use "
            "--delta, or --lora auto for nearly the same change."
        )


def _layer(names: LoraNames, name: str, b: Tensor, a: Tensor, kernel: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of one layer: B (out, rank) and A (rank, in * height * width), whose kernel is (height, width)."""
    up = b.reshape(*b.shape, *(1 for _ in kernel))
    down = a.reshape(len(a), -1, *kernel)
    layer, (end_a, end_b, end_alpha) = names.layer(name), names.ends(name)
    factors = {f"{layer}{end_a}": down, f"{layer}{end_b}": up}
    return factors if end_alpha is None else {**factors, f"{layer}{end_alpha}": torch.tensor(float(len(a)))}


def notable_loss(report: Mapping[str, Any]) -> str | None:
    """A sentence about the part of the change that is lost, or None if it is small.

    Args:
        report: The report of ``low_rank``.
    """
    name, share = max(report["residual"].items(), key=lambda item: float(item[1]))
    if share <= NOTABLE_RESIDUAL:
        return None
    if report["rank"] >= report["notable_rank"]:  # the rank is enough, so the dtype causes the loss
        return f"the type of the weights leaves out {share:.1%} of the change of {name}: write them as float32."
    return (
        f"rank {report['rank']} leaves out {share:.0%} of the change of {name} (Frobenius norm): rank "
        f"{report['notable_rank']} would keep {1 - NOTABLE_RESIDUAL:.0%} of every layer's, --lora auto "
        f"{1 - AUTO_RESIDUAL:.1%} (rank {max(report['needed_rank'].values())})."
    )
