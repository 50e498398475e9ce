"""Divides rows, batches and solves among processes so that the result is the same as with one process.

Results that several processes need are computed by one process and sent to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class Processes:
    """The processes of a module's trainer; with one process, that process does all the work.

    Args:
        module: Module whose trainer is used; it must be attached to a trainer.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module

    @property
    def trainer(self) -> L.Trainer:
        """The trainer of the run.

        Raises:
            RuntimeError: The module is not attached to a trainer.
        """
        return self.module.trainer

    def own_share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every ``world_size``-th of ``parts``, beginning with number ``global_rank``; empty if there are too few."""
        return parts[self.trainer.global_rank :: self.trainer.world_size]

    def total(self, part: Tensor) -> Tensor:
        """Sum of ``part`` over processes, returned to all of them on the device of ``part``."""
        if self.module._trainer is None or self.trainer.world_size == 1:
            return part
        # GPUs can only exchange tensors on GPUs; at the end of a fit the module itself is back on the CPU.
        device = self.trainer.strategy.root_device
        return self.trainer.strategy.reduce(part.to(device), reduce_op="sum").to(part.device)

    def made_once(self, count: int, make: Callable[[list[int]], Tensor]) -> Tensor:
        """Rows ``0 .. count - 1`` of a result of the frozen model, each made by one process and sent to all.

        Args:
            count: Number of rows.
            make: Makes rows (n, ...) from their numbers; each row must depend only on its number.

        Returns:
            All rows (count, ...), on every process.

        Raises:
            Exception: ``make`` has failed; on the other processes, a RuntimeError that another process has failed.
        """
        world_size = self.trainer.world_size
        if world_size == 1:
            return make(list(range(count)))
        share = list(self.own_share(range(count))) or [0]
        share += [share[-1]] * (-(-count // world_size) - len(share))  # all_gather needs equal shapes
        made = self.unless_one_failed(attempt(partial(make, share)))
        gathered = self.module.all_gather(
            made.to(self.module.device)
        )  # (world_size, n, ...); NCCL knows no other place
        assert isinstance(gathered, Tensor)
        return gathered.transpose(0, 1).flatten(0, 1)[:count]

    def unless_one_failed(self, result: T | Exception) -> T:
        """Return ``result`` if no process has an error as its result, so that no process waits for ever for another.

        Raises:
            Exception: ``result`` itself if it is an error, else a RuntimeError that another process has failed.
        """
        failed = isinstance(result, Exception)
        others = int(self.total(torch.tensor(int(failed), device=self.module.device)))
        if isinstance(result, Exception):
            raise result
        if others:
            raise RuntimeError("Another process has failed: its message says why.")
        return result

    def gathered(self, own: T) -> list[T]:
        """``own`` of every process, in the order of the processes, on all of them."""
        return self.solved_once([lambda: own] * self.trainer.world_size)

    def solved_once(self, solve: Sequence[Callable[[], T]]) -> list[T]:
        """Results of ``solve``, each called by one process and sent to all; they may contain tensors of any shape.

        The tensors of results from another process are on the CPU.

        Raises:
            Exception: A call has failed; every process raises it, so that no process waits for ever for another.
        """
        if self.trainer.world_size == 1:
            return [function() for function in solve]
        own: list[Any] = [attempt(function) for function in self.own_share(solve)]
        results = []
        for number in range(len(solve)):
            rank = number % self.trainer.world_size
            mine = own[number // self.trainer.world_size] if rank == self.trainer.global_rank else None
            # Pickled tensors would be restored on the sender's device, so they are moved to the CPU first.
            sent = self.trainer.strategy.broadcast(tree_map_only(Tensor, Tensor.cpu, mine), src=rank)
            if isinstance(sent, Exception):
                raise sent
            results.append(sent)
        return results


def attempt(function: Callable[[], T]) -> T | Exception:
    """What ``function`` returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:  # any error: the caller raises it after telling the other processes
        return error
