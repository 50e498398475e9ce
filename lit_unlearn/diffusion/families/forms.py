"""Checks of configurations that several families make before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_conditions(unet: Any, conditions: Mapping[str, str], model: str) -> None:
    """Check that a UNet takes no input that the family does not give it.

    Args:
        unet: Its configuration.
        conditions: Fields for such inputs, each with the name of the input.
        model: The model's name, which begins the message.

    Raises:
        ValueError: One of the fields is set.
    """
    for field, what in conditions.items():
        if (value := unet.get(field)) is not None:
            raise ValueError(
                f"model={model!r}: unet/config.json has {field}={value!r}: it takes {what} as an input, which is not "
                "supported; take the model that it was made from, with text as its only condition."
            )


def check_latents(channels: Mapping[str, int], vae: Any, model: str) -> None:
    """Check that the denoiser and the autoencoder have the same latents, and that pictures have three channels.

    Args:
        channels: Numbers of channels of the denoiser, by the name of their field, which begins with the part's.
        vae: Configuration of the autoencoder.
        model: The model's name, which begins the message.

    Raises:
        ValueError: They differ.
    """
    for field, value in channels.items():
        if value != vae.latent_channels:
            raise ValueError(
                f"model={model!r} has {field}={value} and vae latent_channels={vae.latent_channels}, which must be "
                "equal: models for inpainting, depth, upscaling or editing of pictures are not supported."
            )
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise ValueError(
            f"model={model!r}: vae/config.json has in_channels={vae.in_channels} and out_channels={vae.out_channels}: "
            "pictures have 3."
        )


def check_equal(values: Mapping[str, Any], model: str) -> None:
    """Check that values, given by the name of their field, are all equal.

    Raises:
        ValueError: They are not.
    """
    if len(set(values.values())) > 1:
        listed = [f"{field}={value}" for field, value in values.items()]
        raise ValueError(
            f"model={model!r} has {', '.join(listed[:-1])} and {listed[-1]}, which must be equal: take all parts from "
            "one pipeline."
        )


def check_sides(part: str, size: object, model: str) -> None:
    """Check that ``sample_size`` of a denoiser gives the sides of its latents.

    Raises:
        ValueError: It does not.
    """
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"model={model!r}: {part}/config.json has sample_size={size!r}: give the side of the latents, or their "
            "height and width, e.g. 64 for pictures of 512 pixels."
        )


__all__ = ["check_conditions", "check_equal", "check_latents", "check_sides"]
