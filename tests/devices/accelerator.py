"""The device as Lightning sees it: ``--trainer.accelerator=pretend --trainer.strategy=pretend``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from devices.pretend import NAME, Settings

ON_DEVICE = [
    f"--trainer.accelerator={NAME}",
    f"--trainer.strategy={NAME}",
    "--trainer.devices=1",
    "--trainer.inference_mode=false",  # wrappers of tensors cannot be made under it
]
ON_PROCESSOR = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.inference_mode=false"]


class PretendAccelerator(Accelerator):
    """One device for each process."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def teardown(self) -> None:
        """Nothing is held."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [Settings.device] * devices  # as if CUDA_VISIBLE_DEVICES gave each process its own

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def register() -> None:
    """Make accelerator and strategy known by the device's name; ``pretend.register`` comes before it."""
    AcceleratorRegistry.register(NAME, PretendAccelerator, description=PretendAccelerator.__doc__ or "")
    StrategyRegistry.register(
        NAME, SingleDeviceStrategy, "one device", device=Settings.device, accelerator=PretendAccelerator()
    )
