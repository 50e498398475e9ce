"""Pictures as tensors, bytes and Pillow images, and as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from lit_unlearn.system.files import atomic_write


def to_uint8(images: Tensor) -> Tensor:
    """Return pictures in [0, 1] as bytes, rounded to the nearest; values outside are clamped, nan becomes black.

    Args:
        images: Any shape, float.

    Returns:
        The same shape, uint8, on the CPU.
    """
    return (images.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return a picture as a tensor.

    Args:
        image: A Pillow image of any mode, or RGB bytes (H, W, 3), uint8.

    Returns:
        (3, H, W), float32 in [0, 1].

    Raises:
        ValueError: The array has another shape or type.
    """
    pixels = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"The picture is {pixels.dtype} of shape {pixels.shape}; expected uint8 of shape (H, W, 3).")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """Return a picture, (3, H, W), float in [0, 1], as a Pillow image."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"The picture has shape {tuple(image.shape)}; expected (3, H, W).")
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy())


def save_png(path: str | os.PathLike[str], image: Image.Image, notes: Mapping[str, str] | None = None) -> None:
    """Write a PNG in one step; a picture that was there survives a failure.

    Args:
        path: The file.
        image: The picture.
        notes: Texts to be kept in the file, by keyword.

    Raises:
        OSError: The file cannot be written; the message names it.
    """
    info = PngImagePlugin.PngInfo()
    for keyword, text in (notes or {}).items():
        info.add_text(keyword, text)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=info)
