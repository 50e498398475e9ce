from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lit_unlearn.attacks.low_rank import LowRankChanges, full_rank
from lit_unlearn.diffusion.sampling import seeded

RANK = 2


@pytest.mark.parametrize("shape", [(5, 4), (6, 3, 2, 2)], ids=["linear", "convolution"])
def test_the_factors_learn_as_in_an_added_layer(shape: tuple[int, ...]) -> None:
    """Three steps of Adam on W + B A agree with autograd through F.linear(x, W) + F.linear(F.linear(x, A), B)."""
    generator = seeded(0)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    inputs = torch.randn(7, start[0].numel(), dtype=torch.float64, generator=generator)
    targets = torch.randn(7, shape[0], dtype=torch.float64, generator=generator)
    weight = nn.Parameter(start.clone())
    changes = LowRankChanges([weight], RANK, seeded(1))
    down = nn.Parameter(changes.downs[0].detach().clone())
    up = nn.Parameter(torch.zeros(shape[0], RANK, dtype=torch.float64))
    assert changes.factors[0].abs().max() == 0
    assert down.abs().max() <= start[0].numel() ** -0.5
    ours, layer = torch.optim.Adam(changes.factors, lr=0.1), torch.optim.Adam([up, down], lr=0.1)
    for _ in range(3):
        loss = F.mse_loss(F.linear(inputs, weight.flatten(1)), targets)
        changes.backward(torch.autograd.grad(loss, [weight]))
        ours.step()
        changes.write()
        expected = F.linear(inputs, start.flatten(1)) + F.linear(F.linear(inputs, down), up)
        layer.zero_grad()
        F.mse_loss(expected, targets).backward()
        layer.step()
    assert_close(weight.detach().flatten(1), (start.flatten(1) + up @ down).detach(), rtol=0, atol=1e-12)
    assert (weight - start).abs().max() > 0.1
    values = torch.linalg.svdvals((weight - start).detach().flatten(1))
    assert values[RANK:].max() < 1e-12 < values[RANK - 1]


def test_the_full_rank_of_a_weight() -> None:
    assert [full_rank(torch.zeros(shape)) for shape in ((5, 4), (6, 3, 2, 2), (7, 1), (3,), ())] == [4, 6, 1, 0, 0]


def test_a_small_weight_has_its_own_rank() -> None:
    changes = LowRankChanges([nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(9, 8))], 4, seeded(0))
    assert [down.shape[0] for down in changes.downs] == [3, 4]
