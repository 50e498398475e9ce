"""Pictures that are kept on disk: PNG files that say how they were drawn, with a hash of their pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_unlearn.system.pixels import save_png


def save_kept(path: Path, image: Image.Image, key: str) -> None:
    """Write ``image``, which was drawn as ``key`` says.

    Raises:
        WriteError: The file cannot be written.
    """
    save_png(path, image, {"key": f"{key}/{path.stem}", "content": _content(image)})


def read_kept(path: Path) -> tuple[str, Tensor]:
    """The key and the pixels (3, H, W), uint8, of a picture that ``save_kept`` wrote.

    Raises:
        ValueError: The file is damaged, or holds another picture than its name says.
    """
    try:
        with Image.open(path) as file:
            image, notes = file.convert("RGB"), file.info
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow says of damage
        raise ValueError(str(error)) from error
    key, _, name = str(notes.get("key")).partition("/")
    if (name, notes.get("content")) != (path.stem, _content(image)):
        raise ValueError("it holds another picture")
    return key, torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _content(image: Image.Image) -> str:
    """Hash of a picture's size and pixels."""
    return hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
