"""The ridge map against the published loop of UCE, the formula of its paper and its objective, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.closed_form import ridge_map_update

D_OUT, D_IN = 6, 20
WEIGHT = normal(D_OUT, D_IN, seed=1)


def published_uce(
    weight: Tensor, keys: Tensor, targets: Tensor, preserved: Tensor, s_e: float, s_p: float, lamb: float
) -> Tensor:
    """UCE as published: sums over concepts, one by one."""
    mat1, mat2 = lamb * weight, lamb * torch.eye(weight.shape[1], dtype=weight.dtype)
    for key, target in zip(keys, targets, strict=True):
        mat1 = mat1 + s_e * target[:, None] @ key[None, :]
        mat2 = mat2 + s_e * key[:, None] @ key[None, :]
    for key in preserved:
        mat1 = mat1 + s_p * (weight @ key)[:, None] @ key[None, :]
        mat2 = mat2 + s_p * key[:, None] @ key[None, :]
    return mat1 @ torch.linalg.inv(mat2)


@pytest.mark.parametrize(("s_e", "s_p", "lamb"), [(1.0, 1.0, 0.5), (0.3, 2.0, 0.1), (1.0, 0.0, 10.0)])
@pytest.mark.parametrize("num_preserved", [0, 5, 40])
def test_uce_matches_the_published_loop(s_e: float, s_p: float, lamb: float, num_preserved: int) -> None:
    keys, preserved = normal(3, D_IN, seed=4), normal(num_preserved, D_IN, seed=9)
    targets = normal(3, D_IN, seed=10) @ WEIGHT.mT
    edited = ridge_map_update(WEIGHT, keys, targets, preserved if num_preserved else None, s_e, s_p, lamb)
    expected = published_uce(WEIGHT, keys, targets, preserved, s_e, s_p, lamb)
    assert (expected - WEIGHT).abs().max() > 1e-2
    assert_close(edited, expected, rtol=0, atol=1e-11)


def test_uce_minimises_its_objective() -> None:
    keys, preserved, targets = normal(3, D_IN, seed=4), normal(5, D_IN, seed=9), normal(3, D_OUT, seed=10)
    edited = ridge_map_update(WEIGHT, keys, targets, preserved, 2.0, 0.7, 0.5).requires_grad_()
    loss = 2.0 * (keys @ edited.mT - targets).square().sum() + 0.7 * (preserved @ (edited - WEIGHT).mT).square().sum()
    loss = loss + 0.5 * (edited - WEIGHT).square().sum()
    (gradient,) = torch.autograd.grad(loss, edited)
    assert gradient.abs().max() < 1e-11


def test_uce_without_ridge_is_the_paper_and_with_a_huge_one_does_nothing() -> None:
    keys, preserved, targets = normal(3, D_IN, seed=4), normal(40, D_IN, seed=9), normal(3, D_OUT, seed=10)
    both, wanted = torch.cat([keys, preserved]).T, torch.cat([targets, preserved @ WEIGHT.T]).T
    paper = wanted @ both.T @ torch.linalg.inv(both @ both.T)  # App. B: W_OLD C* C^T (C C^T)^-1
    assert_close(ridge_map_update(WEIGHT, keys, targets, preserved, lamb=0.0), paper, rtol=0, atol=1e-11)
    assert_close(ridge_map_update(WEIGHT, keys, targets, preserved, lamb=1e12), WEIGHT, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="singular with ridge=0"):
        ridge_map_update(WEIGHT, keys, targets, lamb=0.0)


def test_uce_keeps_the_preserved_outputs_better_the_more_they_weigh() -> None:
    keys, preserved, targets = normal(3, D_IN, seed=4), normal(5, D_IN, seed=9), normal(3, D_OUT, seed=10)
    drifts = [
        (preserved @ (ridge_map_update(WEIGHT, keys, targets, preserved, 1.0, scale) - WEIGHT).mT).norm().item()
        for scale in (0.0, 1.0, 1e4)
    ]
    assert drifts[0] > drifts[1] > 100 * drifts[2]
