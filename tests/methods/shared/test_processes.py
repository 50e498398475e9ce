from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.layer_state import per_item
from lit_unlearn.methods.shared.processes import Processes


class Strategy:
    """Of one process of several: a sum over processes is what this one has and what is said to be the others'."""

    root_device = torch.device("cpu")

    def __init__(self, others: Tensor | float = 0.0) -> None:
        self.others = others

    def reduce(self, part: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return part + self.others


def editor(world_size: int = 1, global_rank: int = 0, others: Tensor | float = 0.0) -> Any:
    module = DiffusionEditor()
    trainer = SimpleNamespace(world_size=world_size, global_rank=global_rank, strategy=Strategy(others))
    module._trainer = trainer  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def processes(world_size: int = 1, global_rank: int = 0, others: Tensor | float = 0.0) -> Processes:
    return editor(world_size, global_rank, others).processes


def test_every_part_is_one_process_s_own() -> None:
    shares = [list(processes(3, rank).own_share(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(processes(3, 2).own_share(range(2))) == []


def test_losses_are_means_over_the_global_batch_and_weigh_by_the_share_of_it() -> None:
    # This process has 3 items with mean 2; the other has 1 item with mean 10.
    module = editor(2, 0, others=torch.tensor([10.0, 1.0]))
    module.log_losses({"train/loss": torch.tensor(2.0)}, torch.zeros(3))
    assert float(module.step_losses["train/loss"]) == pytest.approx((3 * 2 + 10) / 4)
    assert module._batch_weight == pytest.approx(2 * 3 / 4)  # DDP takes the mean of both processes' gradients
    alone = editor()
    alone.log_losses({"train/loss": torch.tensor(2.0, requires_grad=True)}, torch.zeros(3))
    assert alone.step_losses["train/loss"] == 2 and not alone.step_losses["train/loss"].requires_grad
    assert alone._batch_weight == 1


def test_one_that_failed_stops_all() -> None:
    with pytest.raises(KeyError, match="mine"):
        processes(2, others=torch.tensor(0)).unless_one_failed(KeyError("mine"))
    with pytest.raises(RuntimeError, match="Another process has failed"):
        processes(2, others=torch.tensor(1)).unless_one_failed("well")
    assert processes(2, others=torch.tensor(0)).unless_one_failed("well") == "well"


def test_alone_everything_is_made_here() -> None:
    module = processes()
    assert module.made_once(3, lambda rows: torch.tensor(rows)).tolist() == [0, 1, 2]
    assert module.solved_once([lambda: 1, lambda: 2]) == [1, 2]
    assert module.gathered("own") == ["own"]
    with pytest.raises(ZeroDivisionError):
        module.solved_once([lambda: 1 // 0])


def test_an_item_counts_for_the_same_however_many_positions_it_has() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [10.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert float(per_item(rows, mask)) == pytest.approx((2 + 10) / 2)
    # So that shares of a batch can be averaged: the parts' means, weighted by their items, are the whole's.
    parts = [float(per_item(rows[i : i + 1], mask[i : i + 1])) for i in range(2)]
    assert float(per_item(rows, mask)) == pytest.approx(sum(parts) / 2)
