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
    found, values = search_tokens(losses, (2, 3, 20), 100, 0.1, seeded(0), CPU, straight_through)
    start, _ = search_tokens(losses, (2, 3, 20), 1, 1e-6, seeded(0), CPU, straight_through)
    if straight_through:  # otherwise they are those of the mixtures
        assert torch.equal(values, losses(one_hot(found, 20)))
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

    found, values = search_tokens(turning, (2, 3, 20), 100, 0.1, seeded(0), CPU, score=score, score_every=5)
    assert len(seen) == 20
    assert torch.equal(values, torch.stack(seen).min(dim=0).values)
    assert torch.equal(losses(one_hot(found, 20)), torch.stack(seen).min(dim=0).values)
    assert (seen[-1] > torch.stack(seen).min(dim=0).values + 1).all()


def test_the_same_generator_finds_the_same() -> None:
    runs = [search_tokens(losses, (2, 3, 20), 3, 0.1, seeded(seed), CPU)[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_it_ends_with_tokens_that_suffice() -> None:
    """Those of the first prompt do so at the second look, those of the second at the fourth."""
    looks: list[Tensor] = []

    def suffices(places: Tensor) -> Tensor:
        looks.append(places)
        return torch.tensor([len(looks) == 2, len(looks) == 4])

    steps: list[int] = []

    def counted(weights: Tensor, step: int) -> Tensor:
        steps.append(step)
        return losses(weights)

    found, values = search_tokens(
        counted, (2, 3, 20), 100, 0.1, seeded(0), CPU, score=losses, score_every=5, suffices=suffices
    )
    assert steps == list(range(20))
    assert torch.equal(found, torch.stack([looks[1][0], looks[3][1]]))
    assert not torch.equal(looks[3][0], looks[1][0])  # the search for the first one has gone on
    assert values.isneginf().all()
    none, values = search_tokens(
        losses, (2, 3, 20), 20, 0.1, seeded(0), CPU, score=losses, suffices=lambda places: torch.zeros(2).bool()
    )
    assert torch.equal(values, losses(one_hot(none, 20)))
