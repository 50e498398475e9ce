"""Says where a command of the trainer runs, and when memory runs out there, what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.system.devices import device_name, explaining_memory


@contextmanager
def on_its_device(
    subcommand: str, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule | None
) -> Iterator[None]:
    """Print what ``subcommand`` runs on; end the block in one sentence if memory runs out.

    Raises:
        UserError: It did.
    """
    device = trainer.strategy.root_device
    if trainer.is_global_zero:
        processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
        print(f"{subcommand} on {device_name(device)}{processes}", flush=True)
    with explaining_memory(subcommand, device, less_memory(subcommand, module, data, device)):
        yield


def less_memory(
    subcommand: str, module: L.LightningModule, data: L.LightningDataModule | None, device: torch.device
) -> list[str]:
    """What takes less memory than this run does: a smaller batch, half of the precision, the processor.

    Weights that learn stay in float32: the steps of these methods would vanish in half of it.
    """
    batch = "batch_size" if subcommand == "fit" else "eval_batch_size"
    size = getattr(data, batch, 1)  # null is every pair at once
    ways = [f"lower --data.{batch} (now {'all at once' if size is None else size})"] if size != 1 else []
    if subcommand == "fit" and isinstance(module, GradientEditor):
        ways.append("compute in half of the precision (--trainer.precision bf16-mixed)")
    elif subcommand == "fit" and getattr(module, "weights_dtype", None) == torch.float32:
        ways.append("load the model in half of the precision (--model.dtype bfloat16)")
    if device.type != "cpu":
        ways.append("run on the processor (--trainer.accelerator cpu)")
    return ways
