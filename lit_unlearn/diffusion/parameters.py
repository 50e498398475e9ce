"""Which weights are edited (groups and patterns) and what they were before (the frozen reference)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

GROUPS: dict[str, str] = {
    "xattn": r"^unet\..*attn2\.",
    "xattn-kv": r"^unet\..*attn2\.to_[kv]\.",
    "xattn-v": r"^unet\..*attn2\.to_v\.",
    "noxattn": r"^unet\.(?!conv_norm_out\.|conv_out\.|time_embedding\.|.*attn2\.)",
    "esd-u": r"^unet\.(?!.*(attn2\.|norm))",
    "selfattn": r"^unet\..*attn1\.",
    "full": r"^unet\.",
    "embedding": r"^text_encoder\..*token_embedding\.weight$",
    "text-fc1": r"^text_encoder\..*mlp\.fc1\.weight$",
    "text-fc2": r"^text_encoder\..*mlp\.fc2\.weight$",
}
"""Weight groups by the names of the field, as regular expressions over full parameter names.

``xattn``, ``noxattn``, ``selfattn`` and ``full`` are those of ESD's code of 2023, whose ``out.`` is ``conv_norm_out``
and ``conv_out`` here and whose ``time_embed`` is ``time_embedding``. ``esd-u`` is that of its code of 2025: all linear
layers and convolutions outside of cross-attention, those of the time embedding and the output included. Its ``esd-x``
equals ``xattn``, its ``esd-x-strict`` equals ``xattn-kv``.
"""


def match_parameters(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that the group or regular expression ``pattern`` selects, in order.

    Args:
        pattern: A key of ``GROUPS``, or a regular expression that is searched in names such as
            ``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight``.
        names: Full parameter names.

    Raises:
        ValueError: The expression is invalid or selects nothing.
    """
    names = list(names)
    try:
        expression = re.compile(GROUPS.get(pattern, pattern))
    except re.error as error:
        raise ValueError(f"edited_parameters={pattern!r} is no regular expression ({error}).") from error
    selected = [name for name in names if expression.search(name)]
    if not selected:
        close = get_close_matches(pattern, GROUPS, n=1) or [name for name in names if name.endswith("weight")][:1]
        raise ValueError(
            f"edited_parameters={pattern!r} selects no parameter: give a group ({', '.join(GROUPS)}) or a pattern that "
            f"is found in names such as {(close or ['?'])[0]!r}."
        )
    return selected


def layer_index(name: str) -> int:
    """Number of the transformer layer that the parameter ``name`` belongs to, counted from 0.

    Raises:
        ValueError: The name has no layer number.
    """
    match = re.search(r"layers\.(\d+)\.", name)
    if match is None:
        raise ValueError(f"The parameter {name!r} belongs to no numbered layer of the text encoder.")
    return int(match[1])


def layer_label(name: str) -> str:
    """Short name of the layer of the weight ``name`` for figures: ``layer 3``, ``down 1.0 K``, ``mid 0 FF``."""
    if not name.startswith("unet."):
        return f"layer {layer_index(name)}"
    blocks, _, layer = name.partition(".transformer_blocks.")
    number, _, layer = layer.partition(".")
    place = blocks.removeprefix("unet.").split("_")[0]
    numbers = [*re.findall(r"\.(\d+)(?!\d)", blocks), *([number] if number != "0" else [])]
    layer = layer.removesuffix(".weight")
    kind = {"attn2.to_k": "K", "attn2.to_v": "V", "ff.net.2": "FF"}.get(layer, layer)
    return f"{place} {'.'.join(numbers)} {kind}"


def call_order(name: str) -> tuple[int, list[int], str]:
    """Sorts weights of the UNet's blocks as these are called: down, mid, up, by number."""
    place = name.removeprefix("unet.").split("_")[0]
    return ["down", "mid", "up"].index(place), [int(digits) for digits in re.findall(r"\.(\d+)\.", name)], name


def num_places(config: Mapping[str, object], name: str) -> int:
    """Positions (height times width) that the block of the UNet's weight ``name`` works on, by the UNet's config."""
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
        """Enter a weight's name, shape, type and values."""
        value = value.detach().cpu().contiguous()
        self._digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        self._digest.update(value.flatten().view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The hash of what was added so far."""
        return self._digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values; equal for equal weights whatever their device."""
    found = Fingerprint()
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return found.hexdigest()


class PretrainedValues:
    """Pretrained values of the edited parameters; all other weights are shared with the live modules.

    For Stable Diffusion 1.4 this keeps 44 M numbers for ``xattn`` and 26 M for ``text-fc2``, never a second model. The
    values stand outside of registered buffers, which DDP would broadcast at every forward.

    Args:
        parameters: The edited parameters by full name, before the first edit.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.values = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        self._beside: dict[str, Tensor] = {}

    def of(self, part: str) -> dict[str, Tensor]:
        """The pretrained values within ``part``, by their names in it, where the parameters lie."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): self.beside(name) for name in self.values if name.startswith(prefix)}

    def beside(self, name: str) -> Tensor:
        """The pretrained value of the parameter ``name``, on the parameter's device and from then on kept there.

        Methods ask the unedited model at every step; those that never do have it on the processor alone.
        """
        device = self.parameters[name].device
        if name not in self._beside or self._beside[name].device != device:
            self._beside[name] = self.values[name].to(device)
        return self._beside[name]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the pretrained values into the live modules for the length of a block; not for use under autograd."""
        edited = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(edited)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        torch.clear_autocast_cache()  # mixed precision keeps casts of weights, and does not see them change
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def unchanged(self) -> bool:
        """Whether there are edited parameters and all have their pretrained values, bit for bit."""
        equal = (torch.equal(self.parameters[name].detach().cpu(), value) for name, value in self.values.items())
        return bool(self.values) and all(equal)

    def change_norm(self) -> float:
        """Frobenius norm of all changes, comparable between methods that edit other weights."""
        return math.sqrt(math.fsum(change for change, _ in self._squares().values()))

    def change_ratio(self) -> float:
        """Weight-change ratio: Frobenius norm of all changes over that of the pretrained values."""
        changes, sizes = zip(*self._squares().values(), strict=True)
        return math.sqrt(math.fsum(changes) / math.fsum(sizes))

    def change_ratios(self) -> dict[str, float]:
        """The same of each edited parameter by itself, by full name; 0 where it has not moved."""
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
