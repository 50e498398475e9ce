from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.core.objectives import esd_target

ETAS = [0.5, 1.0, 3.0]


def predictions() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    e_from, e_c, e_0 = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    return e_from, e_c, e_0


@pytest.mark.parametrize("eta", ETAS)
def test_the_form_of_2025_with_one_more_is_that_of_the_paper(eta: float) -> None:
    _, e_c, e_0 = predictions()
    paper = e_0 - eta * (e_c - e_0)
    # float64 rounding of numbers of order 1
    assert_close(esd_target(e_c, e_c, e_0, eta + 1), paper, rtol=0, atol=1e-13)
    assert_close(esd_target(e_0, e_c, e_0, eta), paper, rtol=0, atol=1e-13)
    # With the other form's eta it is another target.
    assert (esd_target(e_c, e_c, e_0, eta) - paper).abs().max() > 1


@pytest.mark.parametrize("eta", ETAS)
def test_the_target_keeps_what_it_is_erased_from_and_leaves_the_concept(eta: float) -> None:
    e_from, e_c, e_0 = predictions()
    away = esd_target(e_from, e_c, e_0, eta) - e_from
    # Straight away from the concept, as seen from the unconditional prediction.
    assert_close(away, eta * (e_0 - e_c), rtol=0, atol=1e-13)
    assert (esd_target(e_from, e_c, e_0, eta) - e_c).norm() > away.norm()


@pytest.mark.parametrize("eta", ETAS)
def test_velocities_and_noises_make_the_same_target(eta: float) -> None:
    noisy, alpha = predictions()[0].flip(0), 0.6

    def noise(velocity: Tensor) -> Tensor:
        return alpha * velocity + (1 - alpha**2) ** 0.5 * noisy

    e_from, e_c, e_0 = velocities = predictions()
    expected = esd_target(*map(noise, velocities), eta)
    assert_close(noise(esd_target(e_from, e_c, e_0, eta)), expected, rtol=0, atol=1e-13)
    # Coefficients that do not sum to 1 would not commute.
    assert (noise(e_from - eta * e_c) - (noise(e_from) - eta * noise(e_c))).abs().max() > 0.1
