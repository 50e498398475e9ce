"""Search for discrete tokens by gradient: it trains weights on the simplex, and takes the token of largest weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_unlearn.core.simplex import project_to_simplex


def one_hot(places: Tensor, count: int) -> Tensor:
    """One-hot weights (..., count), float32, with the one at ``places`` (...)."""
    return F.one_hot(places, count).float()


def search_tokens(
    losses: Callable[[Tensor, int], Tensor],
    shape: tuple[int, int, int],
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    device: torch.device,
    straight_through: bool = True,
    score: Callable[[Tensor], Tensor] | None = None,
    score_every: int = 10,
    suffices: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find tokens with a low loss for each of n prompts, by Adam on relaxed one-hot weights.

    The weights of a token are projected onto the probability simplex after every step (UnlearnDiffAtk, Zhang et al.,
    2024). With ``straight_through`` the loss is computed on the arg-max and its gradient is passed to the weights (as
    in P4D, Chin et al., 2024), since mixtures of many embeddings can have effects that single tokens cannot.

    Args:
        losses: Computes losses (n,) from weights (n, k, A) and the number of the step.
        shape: n prompts, k tokens each, A tokens to choose from.
        steps: Steps of Adam.
        learning_rate: Learning rate of the weights.
        generator: Generator of the initial weights, on the CPU.
        device: Device of the weights.
        straight_through: Whether the loss is computed on one token per place, instead of on the mixture.
        score: Computes scores (n,) from one-hot weights (n, k, A), lower is better. It is called every ``score_every``
            steps, and the tokens with the best score are returned. If it is None, the losses of all steps are the
            scores with ``straight_through``; otherwise the last arg-max is returned.
        score_every: See ``score``.
        suffices: Tells for each prompt whether its tokens (n, k) are good enough, (n,) bool. It is called after
            ``score``; such tokens are kept with the score ``-inf``, and the search ends when all prompts have them.

    Returns:
        Indices (n, k) of the tokens to choose from; and the best scores (n,), or the last losses if there are none.
    """
    count = shape[-1]
    start = project_to_simplex(torch.rand(shape, generator=generator)).to(device)
    weights = nn.Parameter(start)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    best = torch.full(shape[:1], torch.inf, device=device)
    chosen = start.argmax(-1)

    def keep_better(places: Tensor, values: Tensor) -> None:
        nonlocal best, chosen
        better = values.detach().to(best) < best
        best = torch.where(better, values.detach().to(best), best)
        chosen = torch.where(better[:, None], places, chosen)

    for step in range(steps):
        places = weights.detach().argmax(-1)
        seen = weights + (one_hot(places, count) - weights).detach() if straight_through else weights
        each = losses(seen, step)
        if score is None and straight_through:
            keep_better(places, each)
        (weights.grad,) = torch.autograd.grad(each.sum(), [weights])
        optimizer.step()
        with torch.no_grad():
            weights.copy_(project_to_simplex(weights))
            if score is not None and ((step + 1) % score_every == 0 or step + 1 == steps):
                places = weights.argmax(-1)
                values = score(one_hot(places, count))
                if suffices is not None:
                    values = torch.where(suffices(places).to(values.device), -torch.inf, values)
                keep_better(places, values)
        if best.isneginf().all():
            break
    if score is None and not straight_through:
        return weights.detach().argmax(-1), each.detach()
    return chosen, best
