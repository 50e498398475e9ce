from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.debiasing import attribute_ratios, debiasing_step

WISHED = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)


def test_shares_count_the_most_probable_attribute_of_judged_pictures() -> None:
    nan = torch.nan
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.3, 0.2], [0.4, 0.5, 0.6], [0.0, 0.8, 0.1], [nan, 0.9, 0.1]])
    assert attribute_ratios(probabilities).tolist() == [0.25, 0.5, 0.25]
    assert attribute_ratios(probabilities[4:]).isnan().all()


def test_a_step_goes_by_what_is_missing() -> None:
    ratios = torch.tensor([[0.9, 0.1], [0.25, 0.75]], dtype=torch.float64)
    alphas = torch.tensor([[0.1, -0.1], [0.3, -0.3]], dtype=torch.float64)
    moved = debiasing_step(alphas, ratios, WISHED, step=0.5, tolerance=0.1)
    # 0.1 + 0.5 (0.5 - 0.9), and its opposite; the second phrase is within the tolerance.
    assert_close(moved, torch.tensor([[-0.1, 0.1], [0.3, -0.3]], dtype=torch.float64))
    assert not torch.equal(debiasing_step(alphas, ratios, WISHED, 0.5, tolerance=0.01)[1], alphas[1])
    unmeasured = torch.full_like(ratios, torch.nan)
    assert torch.equal(debiasing_step(alphas, unmeasured, WISHED, 0.5, 0.1), alphas)


def test_rounds_lead_to_the_wished_shares() -> None:
    """Two phrases whose shares answer to alpha by a logistic curve, one of them strongly biased."""
    bias, slope = torch.tensor([4.0, -1.0], dtype=torch.float64), 10.0

    def measured(alphas: Tensor) -> Tensor:
        first = torch.sigmoid(bias + slope * (alphas[:, 0] - alphas[:, 1]))
        return torch.stack([first, 1 - first], dim=1)

    alphas = torch.zeros_like(WISHED)
    assert (measured(alphas) - WISHED).abs().max() > 0.4
    for _ in range(40):
        alphas = debiasing_step(alphas, measured(alphas), WISHED, step=0.1, tolerance=1e-3)
    assert (measured(alphas) - WISHED).abs().max() < 2e-3
    # Solved by hand: sigmoid(b + 2 s a) = w.
    expected = (torch.logit(WISHED[:, 0]) - bias) / (2 * slope)
    assert_close(alphas[:, 0], expected, rtol=0, atol=2e-3)
    assert_close(alphas.sum(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
