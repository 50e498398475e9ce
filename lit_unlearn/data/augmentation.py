"""Shrinks or enlarges pictures at random and adds words for it to the prompt (Concept Ablation, for objects)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = ("", ", far away", ", zoomed in")
"""Words added to a prompt whose picture is about as large as before, much smaller, or cut from an enlarged one."""
FAR = 0.6
"""Pictures below this scale count as far away."""


def reframe(picture: Tensor, grid: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Scale a picture at random: a smaller picture is placed on grey, an enlarged one is cut; half are mirrored.

    The scale is 1/3 to 1 in two of three cases, else 1.2 to 1.4, rounded to whole latent cells. The mask marks the
    latents that the picture covers; the grey around it should not be learned.

    Args:
        picture: (3, H, W), float in [0, 1].
        grid: Height and width of its latents; H and W are multiples of them.
        generator: Source of the scale, the position and the mirroring.

    Returns:
        The picture (3, H, W), its mask (1, h, w) on the latents, bool, and which of ``WORDS`` describes it.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def place(room: int) -> int:
        return int(torch.randint(room + 1, (), generator=generator))

    if draw(0, 1) < 0.5:
        picture = picture.flip(-1)
    scale = draw(1 / 3, 1) if draw(0, 1) < 2 / 3 else draw(1.2, 1.4)
    height, width = picture.shape[-2:]
    cell = (height // grid[0], width // grid[1])
    cells = [max(1, round(scale * size)) for size in grid]
    size = (cells[0] * cell[0], cells[1] * cell[1])
    scaled = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    top, left = (place(abs(mine - whole)) for mine, whole in zip(cells, grid, strict=True))
    if scale > 1:
        y, x = top * cell[0], left * cell[1]
        return scaled[:, y : y + height, x : x + width], torch.ones(1, *grid, dtype=torch.bool), 2
    mask = torch.zeros(1, *grid, dtype=torch.bool)
    mask[:, top : top + cells[0], left : left + cells[1]] = True
    canvas = torch.full_like(picture, 0.5)
    canvas[:, mask[0].repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)] = scaled.flatten(1)
    return canvas, mask, 1 if scale < FAR else 0
