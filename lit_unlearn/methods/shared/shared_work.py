"""What several processes divide among themselves so that they find what one would: rows, batches, results, losses.

Everything that one process makes and others need is made once. Each step exchanges one message before the gradients:
the losses to log, and how much of the global batch each process has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class SharedWork(L.LightningModule):
    """Mixin of the methods: how processes share work; with one process all of it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.step_losses: dict[str, Tensor] = {}
        self._batch_weight = 1.0

    def own_share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every ``world_size``-th of ``parts``, beginning with the ``global_rank``-th; none if there are too few."""
        return parts[self.trainer.global_rank :: self.trainer.world_size]

    def total(self, part: Tensor) -> Tensor:
        """Sum over processes of ``part``, on all of them, where ``part`` lies."""
        if self._trainer is None or self._trainer.world_size == 1:
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
        gathered = self.all_gather(made.to(self.device))  # (world_size, n, ...); NCCL knows no other place
        assert isinstance(gathered, Tensor)
        return gathered.transpose(0, 1).flatten(0, 1)[:count]

    def unless_one_failed(self, result: T | Exception) -> T:
        """``result`` of this process if no process has an error for one, so that none waits for another for ever.

        Raises:
            Exception: ``result`` if it is one, or else that another process has failed.
        """
        failed = isinstance(result, Exception)
        others = int(self.total(torch.tensor(int(failed), device=self.device)))
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

    def log_losses(self, losses: Mapping[str, Tensor], batch: Sequence[Any] | Tensor) -> None:
        """Log means over the global batch, keep them as ``step_losses``, and find this process's part of the batch.

        Args:
            losses: Means over this process's items, by the names that they are logged under.
            batch: These items.
        """
        self.step_losses = {name: loss.detach().float() for name, loss in losses.items()}
        if self.trainer.world_size > 1:
            count = torch.tensor([float(len(batch))], device=self.device)
            *sums, total = self.total(torch.cat([torch.stack(list(self.step_losses.values())) * count, count]))
            self._batch_weight = float(self.trainer.world_size * count / total)
            self.step_losses = {name: value / total for name, value in zip(losses, sums, strict=True)}
        self.log_dict(self.step_losses, prog_bar=True, batch_size=len(batch))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Weight the loss by this process's part: DDP averages over processes, the loss is a mean over items.

        ``log_losses`` comes before it.
        """
        super().backward(loss * self._batch_weight, *args, **kwargs)


def attempt(function: Callable[[], T]) -> T | Exception:
    """What ``function`` returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:  # of any kind: the caller raises it, once the other processes know
        return error
