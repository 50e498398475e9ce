"""Clip skip: prompts are read some layers earlier than the model's own, as community models are used.

Diffusers has it as an argument of the call, ``clip_skip=k`` (``encode_prompt`` of its pipelines of Stable Diffusion,
XL and 3): each CLIP's states are those ``k`` layers before the ones that the model reads. It is for prompts only:

    prompts                             the earlier layer; of Stable Diffusion 1 and 2 the final norm follows as usual
    pooled vectors                      the encoder's end, as without it
    what guidance leads away from       the model's own layer: the empty prompt, a negative prompt (``unskipped``)

Web UIs count from one: their "Clip skip 2" of Stable Diffusion 1 is 1 here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_unlearn.diffusion.pipeline import Pipeline

LAYERS_OF_SD2 = 23
"""Layers of the text encoder of Stable Diffusion 2 in diffusers; that of Stable Diffusion 1 has 12."""
Places = Mapping[str, Mapping[str, int]]
"""For each text encoder, the layer after which each way reads it, as ``Pipeline.read_after``."""


class ImpossibleClipSkipError(ValueError):
    """Clip skip that a model does not have.

    Args:
        why: The beginning of the sentence.
        remedy: What to give instead, the end of the sentence.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}{remedy}.")
        self.why = why.rstrip(":; ")
        self.remedy = remedy


def is_number(clip_skip: object) -> bool:
    """Whether it is a number of layers, or None for none."""
    return clip_skip is None or (isinstance(clip_skip, int) and not isinstance(clip_skip, bool) and clip_skip >= 1)


def check_number(clip_skip: int | None) -> None:
    """Refuse what is no number of layers.

    Raises:
        ValueError: It is not a whole number, or less than 1.
    """
    if not is_number(clip_skip):
        raise ValueError(
            f"clip_skip={clip_skip!r} must be a whole number of at least 1, as in diffusers (the Clip skip of web UIs "
            "less one), or be left out."
        )


def check_clip_skip(clip_skip: int | None, family: type[Pipeline], names: Sequence[str], model: str) -> None:
    """Refuse clip skip that a model does not have.

    Args:
        clip_skip: The number of layers; None for none.
        family: The model's family.
        names: Full names of the model's weights.
        model: The model's name, for the message.

    Raises:
        ImpossibleClipSkipError: The family reads no text encoder earlier, or one has too few layers.
    """
    if clip_skip is None:
        return
    if not family.skips:
        raise ImpossibleClipSkipError(
            f"clip_skip={clip_skip} has no effect: model={model!r} is of {family.title}, which diffusers draws without "
            "it; ",
            "leave it out",
        )
    for part in family.skips:
        number = layer_count(part, names)
        most = number + family.read_after[part]["tokens"]
        if clip_skip > most:
            remedy = f"give at most {most}" if most > 0 else "leave it out"
            raise ImpossibleClipSkipError(
                f"clip_skip={clip_skip} leaves {part} of model={model!r}, which has {number} layers, none to read "
                "after: ",
                remedy,
            )


def layer_count(part: str, names: Sequence[str]) -> int:
    """Number of layers of a CLIP, from the full names of the model's weights."""
    found = (re.match(rf"{part}\..*layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def places_of(family: type[Pipeline], clip_skip: int | None) -> Places:
    """``Pipeline.read_after`` of a family whose prompts are read ``clip_skip`` layers earlier."""
    skipped = clip_skip or 0
    return {
        part: {way: place - skipped * (way == "tokens" and part in family.skips) for way, place in ways.items()}
        for part, ways in family.read_after.items()
    }


def unread_weights(family: type[Pipeline], names: Sequence[str], clip_skip: int | None) -> list[str]:
    """Those of ``names`` that the condition of no prompt depends on, in their order.

    They are ``Pipeline.unread`` and the layers that clip skip leaves out of an encoder without a pooled vector. Of the
    latter the empty prompt depends, which guidance leads away from.
    """
    unread = set(family.unread(names))
    if clip_skip is not None:
        for part, ways in places_of(family, clip_skip).items():
            end = layer_count(part, names) + max(ways.values()) + 1 if part in family.skips else None
            layers = ((name, re.match(rf"{part}\..*layers\.(\d+)\.", name)) for name in names)
            unread |= {name for name, match in layers if match and end is not None and int(match[1]) >= end}
    return [name for name in names if name in unread]


def how_unread(clip_skip: int | None) -> str:
    """The end of a sentence that leaves out the weights of ``unread_weights``."""
    return "which the model does not read" if clip_skip is None else f"with which no prompt is read at {clip_skip=}"


def how_to_draw(family: type[Pipeline], clip_skip: int | None, names: Sequence[str]) -> str:
    """How to draw with a model whose prompts are read earlier, in a sentence; empty if they are not.

    Only what is known of other programs is said: A1111's ``sd_hijack_clip`` and ComfyUI's ``clip_layer`` read
    ``hidden_states[-n]`` of Stable Diffusion 1 for their numbers n and -n, and ComfyUI those of both encoders of XL. Of
    Stable Diffusion 2 both count otherwise or not at all: its files have one layer more than diffusers' encoder.

    Args:
        family: The model's family.
        clip_skip: The number of layers; None for none.
        names: Full names of the model's weights.
    """
    if clip_skip is None:
        return ""
    told = {
        "StableDiffusionPipeline": f', in web UIs with "Clip skip" {clip_skip + 1}, in ComfyUI with CLIP Set Last '
        f"Layer {-clip_skip - 1}",
        "StableDiffusionXLPipeline": f", in ComfyUI with CLIP Set Last Layer {-clip_skip - 2}",
    }
    if layer_count("text_encoder", names) >= LAYERS_OF_SD2:
        del told["StableDiffusionPipeline"]
    return f"draw with clip_skip={clip_skip} in diffusers{told.get(family.index_class, '')}"


def lines_before_a_call(parts: Collection[str]) -> str:
    """What a script needs before a call of diffusers with ``clip_skip``, for a model with these parts.

    For Stable Diffusion 1 and 2 diffusers 0.42 takes the final norm from where transformers 5 no longer has it.
    """
    return "" if "text_encoder_2" in parts else NORM


NORM = """
if not hasattr(pipeline.text_encoder, "text_model"):  # as transformers 4 called it, and as clip_skip looks for it
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)"""
