"""What several processes divide among themselves so that they find what one would: rows, batches, results.

Everything that one process makes and others need is made once.
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
    """The processes of a module's trainer; with one process all work stays as it is.

    Args:
        module: Whose trainer is meant; there is none before a run.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module

    @property
    def trainer(self) -> L.Trainer:
        """The run's.

        Raises:
            RuntimeError: There is no run.
        """
        return self.module.trainer

    def own_share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every ``world_size``-th of ``parts``, beginning with the ``global_rank``-th; none if there are too few."""
        return parts[self.trainer.global_rank :: self.trainer.world_size]

    def total(self, part: Tensor) -> Tensor:
        """Sum over processes of ``part``, on all of them, where ``part`` lies."""
        if self.module._trainer is None or self.trainer.world_size == 1:
            return part
        # GPUs exchange nothing that lies elsewhere; the module itself is back on the processor when a fit ends.
        device = self.trainer.strategy.root_device
        return self.trainer.strategy.reduce(part.to(device), reduce_op="sum").to(part.device)

    def made_once(self, count: int, make: Callable[[list[int]], Tensor]) -> Tensor:
        """Rows ``0 .. count - 1`` of what the frozen model must provide, each made by one process and shared with all.

        Args:
            count: How many rows there are.
            make: From numbers of rows to these rows, (n, ...); what it makes of a number depends on that alone.

        Returns:
            All rows (count, ...), on every process.

        Raises:
            Exception: What ``make`` raises; on the other processes, that one has failed.
        """
        world_size = self.trainer.world_size
        if world_size == 1:
            return make(list(range(count)))
        share = list(self.own_share(range(count))) or [0]
        share += [share[-1]] * (-(-count // world_size) - len(share))  # all_gather takes equal shapes
        made = self.unless_one_failed(attempt(partial(make, share)))
        gathered = self.module.all_gather(
            made.to(self.module.device)
        )  # (world_size, n, ...); NCCL knows no other place
        assert isinstance(gathered, Tensor)
        return gathered.transpose(0, 1).flatten(0, 1)[:count]

    def unless_one_failed(self, result: T | Exception) -> T:
        """``result`` of this process if no process has an error for one, so that none waits for another for ever.

        Raises:
            Exception: ``result`` if it is one, or else that another process has failed.
        """
        failed = isinstance(result, Exception)
        others = int(self.total(torch.tensor(int(failed), device=self.module.device)))
        if isinstance(result, Exception):
            raise result
        if others:
            raise RuntimeError("Another process has failed: its message says why.")
        return result

    def gathered(self, own: T) -> list[T]:
        """What each process gives, in the order of the processes, on all of them."""
        return self.solved_once([lambda: own] * self.trainer.world_size)

    def solved_once(self, solve: Sequence[Callable[[], T]]) -> list[T]:
        """Results of ``solve``, each called by one process and sent to all, with tensors of any shapes in them.

        What was sent comes with its tensors on the processor.

        Raises:
            Exception: What one of ``solve`` raises, on every process, so that none waits for another for ever.
        """
        if self.trainer.world_size == 1:
            return [function() for function in solve]
        own: list[Any] = [attempt(function) for function in self.own_share(solve)]
        results = []
        for number in range(len(solve)):
            rank = number % self.trainer.world_size
            mine = own[number // self.trainer.world_size] if rank == self.trainer.global_rank else None
            # The broadcast pickles, and a tensor would come out on the sender's device: it goes by the CPU.
            sent = self.trainer.strategy.broadcast(tree_map_only(Tensor, Tensor.cpu, mine), src=rank)
            if isinstance(sent, Exception):
                raise sent
            results.append(sent)
        return results


def attempt(function: Callable[[], T]) -> T | Exception:
    """What ``function`` returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:  # of any kind: the caller raises it, once the other processes know
        return error
