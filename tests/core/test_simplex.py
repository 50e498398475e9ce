from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.simplex import project_to_simplex


def nearest_by_trial(point: Tensor) -> Tensor:
    """The nearest point of the simplex, by trying which entries are positive: there the projection is a shift."""
    candidates = []
    for size in range(1, len(point) + 1):
        for support in combinations(range(len(point)), size):
            chosen = torch.tensor(support)
            candidate = torch.zeros_like(point)
            candidate[chosen] = point[chosen] + (1 - point[chosen].sum()) / size
            if (candidate >= 0).all():
                candidates.append(candidate)
    return min(candidates, key=lambda candidate: float((candidate - point).square().sum()))


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_it_is_the_nearest_point(spread: float) -> None:
    points = spread * torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([nearest_by_trial(point) for point in points])
    assert_close(project_to_simplex(points), expected, rtol=0, atol=1e-12)
    assert (expected - points).abs().max() > 0.1  # none was on the simplex before


def test_points_of_the_simplex_stay_and_all_others_get_there() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 3, 1000, generator=generator)
    projected = project_to_simplex(points)
    assert projected.min() == 0  # many entries leave, as a choice needs
    assert_close(projected.sum(-1), torch.ones(2, 3))
    assert_close(project_to_simplex(projected), projected)
    assert_close(project_to_simplex(torch.eye(4)), torch.eye(4))
