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


def float64_of_a_fit(args: list[str]) -> dict[str, Any]:
    """Bytes of float64 on the device before each step of a fit, at most within it, and after it.

    The device passes for one that is quick at float64, so that it solves by itself.
    """
    from unittest.mock import patch

    from devices.pretend import Settings
    from lit_unlearn.callbacks.preemption import SaveOnSignal
    from lit_unlearn.cli import main

    count, between = Settings.float64_bytes, []
    original = SaveOnSignal.on_train_batch_start

    def look(self: SaveOnSignal, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        between.append(count.now())

    count.restart()
    with (
        patch("lit_unlearn.system.devices._is_fast", lambda device: True),
        patch.object(SaveOnSignal, "on_train_batch_start", look),
    ):
        assert main(args) == 0
    return {"between": between, "peak": count.peak, "after": count.now()}


def left_behind(model: str, device: str) -> list[tuple[str, int, str]]:
    """For each part of a model that is loaded: storages of the parts before it still held by the processor, and where
    these parts lie.
    """
    from unittest.mock import patch

    from torch.multiprocessing.reductions import StorageWeakRef

    from lit_unlearn.diffusion import load as loading

    original, held, found = loading._load_part, [], []

    def load(kind: Any, path: Any, part: str, options: dict[str, Any]) -> Any:
        found.append((part, sum(not storage.expired() for storage in held)))
        module = original(kind, path, part, options)
        held.extend(StorageWeakRef(weight.untyped_storage()) for weight in module.parameters())
        return module

    with patch.object(loading, "_load_part", load), torch.device(device):
        loaded = loading.load_pipeline(model)
    places = {name: {weight.device.type for weight in part.parameters()} for name, part in loaded.parts.items()}
    return [(part, count, ",".join(sorted(places[part]))) for part, count in found]


def places_of(args: list[str]) -> list[dict[str, Any]]:
    """Where the parts lie whenever one of them comes to the device during a command, and which one it is."""
    from unittest.mock import patch

    from lit_unlearn.cli import main
    from lit_unlearn.diffusion.offload import Offload

    found: list[dict[str, Any]] = []
    original = Offload.bring

    def bring(self: Offload, names: Any) -> None:
        names = set(names)
        original(self, names)
        places = {
            name: "+".join(sorted({weight.device.type for weight in part.parameters()}))
            for name, part in self.parts.items()
        }
        found.append({"wanted": sorted(names), "held": sorted(self.held), "places": places})

    with patch.object(Offload, "bring", bring):
        assert main(args) == 0
    return found
