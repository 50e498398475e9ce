"""Selects the edited weights (groups and patterns) and keeps their pretrained values (the frozen reference)."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.text_ways import FIRST, WAYS
from lit_unlearn.system.errors import plain_warnings

GROUPS: dict[str, str] = {
    "xattn": r"^(unet|transformer)\..*attn2\.",
    "xattn-kv": r"^(unet|transformer)\..*attn2\.to_[kv]\.weight$",
    "xattn-v": r"^(unet|transformer)\..*attn2\.to_v\.weight$",
    "noxattn": r"^unet\.(?!conv_norm_out\.|conv_out\.|time_embedding\.|.*attn2\.)",
    "esd-u": r"^unet\.(?!.*(attn2\.|norm))",
    "selfattn": r"^(unet|transformer)\..*attn1\.",
    "full": r"^(unet|transformer)\.",
    "joint-kv": r"^transformer\..*\.attn\.add_[kv]_proj\.weight$",
    "context": "|".join(WAYS[way] for way in FIRST),
    "embedding": r"^text_encoder(_\d)?\.(.*token_embedding|shared)\.weight$",
    "text-fc1": r"^text_encoder(_\d)?\..*(mlp\.fc1|DenseReluDense\.wi(_\d)?)\.weight$",
    "text-fc2": r"^text_encoder(_\d)?\..*(mlp\.fc2|DenseReluDense\.wo)\.weight$",
}
"""Weight groups with their usual names in the literature, as regular expressions over full parameter names.

``xattn``, ``noxattn``, ``selfattn`` and ``full`` are those of ESD's code of 2023, where ``conv_norm_out`` and
``conv_out`` are called ``out.``, and ``time_embedding`` is called ``time_embed``. ``esd-u`` is that of its code of
2025: all linear layers and convolutions outside cross-attention, including those of the time embedding and the output.
Its ``esd-x`` equals ``xattn``, its ``esd-x-strict`` equals ``xattn-kv``. ``noxattn`` and ``esd-u`` select
nothing in a transformer; those of cross- and self-attention do in one that has both, such as PixArt's, and nothing in
one with joint attention, whose ``attn2`` is between parts of the picture. ``joint-kv`` is what turns text into keys and
values of joint attention. ``context`` is every first linear map on the text encoders' outputs: K and V of a UNet's
cross-attention, ``context_embedder``, or the first layer of ``caption_projection``; and the first map on the pooled
vector, if there is one. ``text-fc1`` and ``text-fc2`` are the linear layers of the feed-forward networks of all text
encoders (``wi`` and ``wo`` in a T5).
"""
CROSS_ATTENTION = ("xattn", "xattn-kv", "xattn-v")
"""The groups of cross-attention to the prompt."""
JOINT = re.compile(r"^transformer\..*\.attn\.add_k_proj\.")
"""Names of weights by which a transformer has joint attention."""


LABELS = {
    "context_embedder": "context",
    "caption_projection.linear_1": "context",
    "time_text_embed.text_embedder.linear_1": "pooled",
    "add_embedding.linear_1": "pooled",
}
"""Short names of single layers of the denoisers, for figures."""


def match_parameters(
    pattern: str,
    names: Iterable[str],
    unread: Collection[str] = (),
    why: str = "which the model does not read",
) -> list[str]:
    """Names that the group or regular expression ``pattern`` selects, in order.

    Args:
        pattern: A key of ``GROUPS``, or a regular expression that is searched in names such as
            ``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight``.
        names: Full parameter names.
        unread: Names of weights that the model's output does not depend on, from ``BaseModel.unread``: they are left
            out, with one warning that names them.
        why: Why, the end of a sentence.

    Raises:
        ValueError: The expression is invalid, or selects nothing, or only weights that are not read.
    """
    names = list(names)
    joint = pattern in CROSS_ATTENTION and any(JOINT.match(name) for name in names)
    try:
        expression = re.compile(GROUPS.get(pattern, pattern))
    except re.error as error:
        raise ValueError(
            f"edited_parameters={pattern!r} is not a regular expression ({error}): give a group or correct it."
        ) from error
    matched = [] if joint else [name for name in names if expression.search(name)]
    selected = [name for name in matched if name not in unread]
    left_out = [name for name in matched if name in unread]
    if left_out and not selected:
        raise ValueError(
            f"edited_parameters={pattern!r} selects only {_listed(left_out)}, {why}: choose weights of earlier layers."
        )
    if not selected:
        close = get_close_matches(pattern, GROUPS, n=1) or [name for name in names if name.endswith("weight")][:1]
        raise ValueError(
            f"edited_parameters={pattern!r} selects no parameter: give a group ({', '.join(GROUPS)}) or a pattern that "
            f"matches names such as {(close or ['?'])[0]!r}."
        )
    if left_out and (pattern, *left_out) not in _LEFT_OUT:
        _LEFT_OUT.add((pattern, *left_out))
        with plain_warnings():
            warnings.warn(
                f"edited_parameters={pattern!r} leaves out {_listed(left_out)}, {why}.",
                stacklevel=2,
            )
    return selected


def _listed(names: Sequence[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_LEFT_OUT: set[tuple[str, ...]] = set()
"""What has been warned of in this process."""


def layer_index(name: str) -> int:
    """Number of the transformer layer that the parameter ``name`` belongs to, counted from 0.

    Raises:
        ValueError: The name has no layer number.
    """
    match = re.search(r"layers\.(\d+)\.|encoder\.block\.(\d+)\.", name)  # of a CLIP, of a T5
    if match is None:
        raise ValueError(f"The parameter {name!r} is not in a numbered layer of the text encoder: choose another.")
    return int(match[1] or match[2])


def layer_label(name: str) -> str:
    """Short name of the layer of the weight ``name`` for figures: ``layer 3``, ``down 1.0 K``, ``mid 0 FF``.

    Layers of a second or third text encoder are ``encoder 2 layer 3``; the maps of ``context`` are ``context`` and
    ``pooled``; those of joint attention, and of a transformer's cross-attention, are ``block 3 K``.
    """
    part, _, inside = name.removesuffix(".weight").partition(".")
    if label := LABELS.get(inside):
        return label
    if part == "transformer":
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(?:attn\.add|attn2\.to)_([qkv])(?:_proj)?", inside)
        return f"block {found[1]} {found[2].upper()}" if found else inside
    if part != "unet":
        number = part.removeprefix("text_encoder").removeprefix("_")
        return f"encoder {number} layer {layer_index(name)}" if number else f"layer {layer_index(name)}"
    blocks, _, layer = name.partition(".transformer_blocks.")
    number, _, layer = layer.partition(".")
    place = blocks.removeprefix("unet.").split("_")[0]
    numbers = [*re.findall(r"\.(\d+)(?!\d)", blocks), *([number] if number != "0" else [])]
    layer = layer.removesuffix(".weight")
    kind = {"attn2.to_k": "K", "attn2.to_v": "V", "ff.net.2": "FF"}.get(layer, layer)
    return f"{place} {'.'.join(numbers)} {kind}"


CALLED = ("add", "time", "adaln", "context", "caption", "down", "mid", "up", "transformer", "single")
"""How names of a denoiser's layers begin, in the order in which these are called."""


def call_order(name: str) -> tuple[int, list[int], str]:
    """Sorting key of a denoiser's weights, in the order in which blocks are called: down, mid, up, by number.

    What is outside of blocks comes first.
    """
    numbers = [int(digits) for digits in re.findall(r"\.(\d+)\.", name)]
    return CALLED.index(name.split(".")[1].split("_")[0]), numbers, name


def num_places(config: Mapping[str, object], name: str) -> int:
    """Number of positions (height times width) in the block of the UNet's weight ``name``, from the UNet's config."""
    place, _, blocks = name.removeprefix("unet.").partition("_blocks.")
    last = len(config["down_block_types"]) - 1  # type: ignore[arg-type]
    number = int(blocks.split(".")[0]) if blocks else 0
    halvings = {"down": number, "up": last - number}.get(place, last)
    height, width = sides(config)
    for _ in range(halvings):
        height, width = -(-height // 2), -(-width // 2)
    return height * width


def sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a UNet's config has as ``sample_size``: one number if they are square."""
    size = config["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


class Fingerprint:
    """SHA-256 of weights that are added one by one, in the order of their names; see ``fingerprint``."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, value: Tensor) -> None:
        """Add a weight's name, shape, type and values."""
        value = value.detach().cpu().contiguous()
        self._digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        self._digest.update(value.flatten().view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The hash of all weights added so far."""
        return self._digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values; equal weights have the same hash on every device."""
    found = Fingerprint()
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return found.hexdigest()


class PretrainedValues:
    """Pretrained values of the edited parameters; all other weights are shared with the live modules.

    For Stable Diffusion 1.4 this stores 44 M numbers for ``xattn`` and 26 M for ``text-fc2``, not a second model. The
    values are not registered as buffers, since DDP would broadcast buffers at every forward.

    Args:
        parameters: The edited parameters by full name, before the first edit.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.values = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        self._beside: dict[str, Tensor] = {}

    def of(self, part: str) -> dict[str, Tensor]:
        """The pretrained values in ``part``, by their names in it, on the devices of the parameters."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): self.beside(name) for name in self.values if name.startswith(prefix)}

    def beside(self, name: str) -> Tensor:
        """The pretrained value of the parameter ``name``, on the parameter's device, where it stays from then on.

        Methods that use the unedited model need it there at every step; for other methods it stays on the CPU.
        """
        device = self.parameters[name].device
        if name not in self._beside or self._beside[name].device != device:
            self._beside[name] = self.values[name].to(device)
        return self._beside[name]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the pretrained values into the live modules within the block; not for use with autograd."""
        edited = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(edited)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        torch.clear_autocast_cache()  # mixed precision caches cast weights, and would not notice the change
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def unchanged(self) -> bool:
        """Whether there are edited parameters, and all of them equal their pretrained values, bit for bit."""
        equal = (torch.equal(self.parameters[name].detach().cpu(), value) for name, value in self.values.items())
        return bool(self.values) and all(equal)

    def change_norm(self) -> float:
        """Frobenius norm of all changes, comparable between methods that edit different weights."""
        return math.sqrt(math.fsum(change for change, _ in self._squares().values()))

    def change_ratio(self) -> float:
        """Weight-change ratio: Frobenius norm of all changes divided by that of the pretrained values."""
        changes, sizes = zip(*self._squares().values(), strict=True)
        return math.sqrt(math.fsum(changes) / math.fsum(sizes))

    def change_ratios(self) -> dict[str, float]:
        """Weight-change ratio of each edited parameter, by full name; 0 if it has not changed."""
        return {
            name: 0.0 if not change else math.sqrt(change / size) if size else math.inf
            for name, (change, size) in self._squares().items()
        }

    def _squares(self) -> dict[str, tuple[float, float]]:
        """Squared norms of each edited parameter's change and of its pretrained values."""
        found = {}
        for name, value in self.values.items():
            before = value.cpu().double()
            change = self.parameters[name].detach().cpu().double() - before
            found[name] = float(change.square().sum()), float(before.square().sum())
        return found
