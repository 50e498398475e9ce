"""Prints the device that a command runs on, and suggests what needs less memory if it runs out of memory."""

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
    """Print the device that ``subcommand`` runs on; explain in one sentence if memory runs out in the block.

    Raises:
        UserError: Memory ran out.
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
    """Ways to need less memory than this run: a smaller batch, half precision, the CPU.

    Trained weights stay in float32: in half precision the steps of these methods would be rounded away.
    """
    batch = "batch_size" if subcommand == "fit" else "eval_batch_size"
    size = getattr(data, batch, 1)  # null means all pairs at once
    ways = [f"lower --data.{batch} (now {'all at once' if size is None else size})"] if size != 1 else []
    if subcommand == "fit" and isinstance(module, GradientEditor):
        ways.append("compute in half of the precision (--trainer.precision bf16-mixed)")
    elif subcommand == "fit" and getattr(module, "weights_dtype", None) == torch.float32:
        ways.append("load the model in half of the precision (--model.dtype bfloat16)")
    if device.type != "cpu" and getattr(module, "offload", True) is False:
        ways.append("keep parts off the device while they are not used (--model.offload true)")
    if device.type != "cpu":
        ways.append("run on the processor (--trainer.accelerator cpu)")
    return ways
