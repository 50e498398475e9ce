"""A condition is handled as one tensor is, whether it has pooled vectors or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition

ROWS, LENGTH, WIDTH, POOLED = 4, 3, 2, 5


def condition(pooled: bool, rows: int = ROWS, first: int = 0) -> Condition:
    """States whose row i, and pooled vectors whose row i, hold numbers of their own."""
    states = torch.arange(first, first + rows * LENGTH * WIDTH, dtype=torch.float64).view(rows, LENGTH, WIDTH)
    vectors = -torch.arange(first, first + rows * POOLED, dtype=torch.float64).view(rows, POOLED)
    return Condition(states, vectors if pooled else None)


def assert_parts(found: Condition, states: Tensor, pooled: Tensor | None) -> None:
    """``found`` holds these and nothing else."""
    assert torch.equal(found.states, states)
    if pooled is None:
        assert found.pooled is None
    else:
        assert found.pooled is not None
        assert torch.equal(found.pooled, pooled)


def both(given: Condition, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """What ``function`` makes of the states and of the pooled vectors."""
    return function(given.states), None if given.pooled is None else function(given.pooled)


with_and_without = pytest.mark.parametrize("pooled", [False, True], ids=["states", "pooled"])


@with_and_without
@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (slice(1, 3), 2),
        ([3, 0, 0], 3),
        (torch.tensor([2, 1]), 2),
        (torch.tensor([True, False, True, True]), 3),
        (slice(4, None), 0),
    ],
)
def test_rows_are_taken_as_of_a_tensor(pooled: bool, rows: Any, count: int) -> None:
    given = condition(pooled)
    assert len(given) == ROWS
    assert len(given[rows]) == count
    assert_parts(given[rows], *both(given, lambda tensor: tensor[rows]))


@with_and_without
def test_parts_lie_below_each_other(pooled: bool) -> None:
    first, second = condition(pooled, rows=1), condition(pooled, rows=3, first=100)
    whole = Condition.cat([first, second, first])
    assert len(whole) == 5
    assert_parts(whole[:1], *both(first, lambda tensor: tensor))
    assert_parts(whole[1:4], *both(second, lambda tensor: tensor))
    assert_parts(whole[4:], *both(first, lambda tensor: tensor))


@with_and_without
def test_the_only_row_stands_for_many_without_a_copy(pooled: bool) -> None:
    given = condition(pooled, rows=1)
    many = given.expand(3)
    assert_parts(many, *both(given, lambda tensor: torch.cat([tensor] * 3)))
    assert many.states.data_ptr() == given.states.data_ptr()
    several = condition(pooled)
    assert_parts(several.expand(ROWS), several.states, several.pooled)
    with pytest.raises(RuntimeError, match="must match"):
        several.expand(3)


@with_and_without
@pytest.mark.parametrize(("size", "counts"), [(3, [3, 1]), (4, [4]), (9, [4]), ([1, 3, 0], [1, 3, 0])])
def test_split_and_cat_undo_each_other(pooled: bool, size: Any, counts: list[int]) -> None:
    given = condition(pooled)
    parts = given.split(size)
    assert [len(part) for part in parts] == counts
    start = 0
    for part, count in zip(parts, counts, strict=True):
        assert_parts(part, *both(given, lambda tensor, at=start, n=count: tensor[at : at + n]))
        start += count
    assert_parts(Condition.cat(parts), given.states, given.pooled)


@with_and_without
def test_where_chooses_whole_rows(pooled: bool) -> None:
    first, second = condition(pooled), condition(pooled, first=100)
    chosen = torch.tensor([True, False, False, True])
    found = Condition.where(chosen, first, second)
    for row, own in enumerate(chosen.tolist()):
        source = first if own else second
        assert_parts(found[row : row + 1], *both(source, lambda tensor, at=row: tensor[at : at + 1]))


@with_and_without
def test_type_and_gradient_change_in_all_parts(pooled: bool) -> None:
    given = condition(pooled)
    given.states.requires_grad_()
    half = given.to(torch.bfloat16)
    assert_parts(half, *both(given, lambda tensor: tensor.bfloat16()))
    assert half.states.dtype == torch.bfloat16
    assert half.states.requires_grad
    apart = given.detach()
    assert_parts(apart, given.states, given.pooled)
    assert not apart.states.requires_grad


def test_a_mask_goes_with_its_rows_and_stays_a_mask() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, False, False]])
    given = replace(condition(False), mask=mask)

    def found(part: Condition) -> list[list[bool]]:
        assert part.mask is not None and part.mask.dtype == torch.bool
        return part.mask.tolist()

    assert found(given[[2, 0]]) == mask[[2, 0]].tolist()
    assert found(given[1:2].expand(3)) == mask[[1, 1, 1]].tolist()
    assert found(given.detach()) == mask.tolist()
    assert [found(part) for part in given.split([1, 3])] == [mask[:1].tolist(), mask[1:].tolist()]
    assert found(Condition.cat([given[:1], given])) == torch.cat([mask[:1], mask]).tolist()
    chosen = torch.tensor([True, False, False, True])
    assert found(Condition.where(chosen, given, given[[1, 0, 0, 0]])) == mask[[0, 0, 0, 3]].tolist()
    moved = given.to(torch.float16)
    assert moved.states.dtype == torch.float16 and found(moved) == mask.tolist()
