"""What takes more than an expression; workers know it as ``devices``."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor


def reread(tensor: Tensor, **options: Any) -> Tensor:
    """``tensor`` written to a file and read again."""
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def moved_in_place(device: torch.device) -> tuple[bool, bool, bool]:
    """Whether weights of a module that moves are the same objects, still weights, and on ``device``."""
    module = torch.nn.Linear(2, 2)
    before = list(module.parameters())
    module.to(device)
    same = all(first is second for first, second in zip(before, module.parameters(), strict=True))
    weights = all(isinstance(weight, torch.nn.Parameter) for weight in module.parameters())
    return same, weights, all(weight.device.type == device.type for weight in module.parameters())


def counted(device: torch.device) -> tuple[int, int, int, int]:
    """Bytes of ten numbers of float64: of a tensor, with a view of it, with another, and when all is gone."""
    from devices.pretend import Settings

    count = Settings.float64_bytes
    before = count.now()
    tensor = torch.zeros(10, dtype=torch.float64, device=device)
    found = [count.now() - before]
    view = tensor[1:]
    found.append(count.now() - before)
    other = tensor + view.sum()  # the number is gone at once
    found.append(count.now() - before)
    del tensor, view, other
    return found[0], found[1], found[2], count.now() - before
