from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_unlearn.attacks.token_search import one_hot, search_tokens
from lit_unlearn.diffusion.sampling import seeded

CPU = torch.device("cpu")
GOALS = torch.randn(2, 3, 5, generator=seeded("goals"))
EMBEDDINGS = torch.randn(20, 5, generator=seeded("embeddings"))


def losses(weights: Tensor, step: int = 0) -> Tensor:
    """How far the mixtures of ``EMBEDDINGS`` are from ``GOALS``, for two prompts of three tokens."""
    return (weights @ EMBEDDINGS - GOALS).square().sum(dim=(1, 2))


@pytest.mark.parametrize("straight_through", [True, False])
def test_it_finds_tokens_of_low_loss(straight_through: bool) -> None:
    found = search_tokens(losses, (2, 3, 20), 100, 0.1, seeded(0), CPU, straight_through)
    start = search_tokens(losses, (2, 3, 20), 1, 1e-6, seeded(0), CPU, straight_through)
    tried = torch.stack([losses(one_hot(places, 20)) for places in torch.cartesian_prod(*[torch.arange(20)] * 3)])
    rank = (tried < losses(one_hot(found, 20))).sum(0)  # among all 8000 choices, for each prompt
    assert (rank < 80).all()
    assert ((tried < losses(one_hot(start, 20))).sum(0) > 800).all()


def test_the_best_that_was_seen_is_kept() -> None:
    """A loss that leads astray after some steps does not take away what was found before."""
    seen: list[Tensor] = []

    def turning(weights: Tensor, step: int) -> Tensor:
        return losses(weights) if step < 50 else -losses(weights)

    def score(weights: Tensor) -> Tensor:
        seen.append(losses(weights))
        return seen[-1]

    found = search_tokens(turning, (2, 3, 20), 100, 0.1, seeded(0), CPU, score=score, score_every=5)
    assert len(seen) == 20
    assert torch.equal(losses(one_hot(found, 20)), torch.stack(seen).min(dim=0).values)
    assert (seen[-1] > torch.stack(seen).min(dim=0).values + 1).all()


def test_the_same_generator_finds_the_same() -> None:
    runs = [search_tokens(losses, (2, 3, 20), 3, 0.1, seeded(seed), CPU) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
