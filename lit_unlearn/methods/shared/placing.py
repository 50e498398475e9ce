"""Where the parts of a model are while a method works on them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from lit_unlearn.system.errors import UserError, plain_warnings

if TYPE_CHECKING:
    from lit_unlearn.methods.shared.editor import DiffusionEditor


def offload_device(module: DiffusionEditor) -> torch.device | None:
    """The device that parts are moved to when they are used; None if they stay where they are loaded.

    Raises:
        UserError: There are several processes.
    """
    if not module.offload:
        return None
    if module._trainer is not None and module.trainer.world_size > 1:
        raise UserError(
            f"model.offload=true works with one process, not {module.trainer.world_size}: set trainer.devices to 1."
        )
    device = torch.get_default_device()  # Lightning sets it while a model is configured
    if device.type == "cpu":
        with plain_warnings():
            warnings.warn("model.offload=true has no effect on the processor.", stacklevel=3)
        return None
    return device


__all__ = ["offload_device"]
