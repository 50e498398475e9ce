"""The null space of the retained keys: what it promises, and which eigenvalues each rule counts as zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.closed_form import (
    EmptyNullSpaceError,
    NullSpaceBasis,
    null_space,
    null_space_from_keys,
    second_moment,
)

D_IN, RANK = 24, 10


def rank_deficient(num_keys: int) -> Tensor:
    """Keys that use RANK of D_IN directions."""
    return normal(num_keys, RANK, seed=1) @ normal(RANK, D_IN, seed=2) / RANK**0.5


def moment_with(eigenvalues: list[float]) -> Tensor:
    """A second moment with a known spectrum in a random basis."""
    size = len(eigenvalues)
    basis = torch.linalg.qr(normal(size, size, seed=3)).Q
    return basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.mT


SPECTRUM = [1e-9, 1e-6, 1e-4, 0.01, 0.1, 1.0, 4.0, 10.0]  # mean 1.889


def test_second_moment_sums_outer_products_and_adds_over_batches() -> None:
    keys = normal(7, 4).to(torch.float16)
    expected = sum(torch.outer(key, key) for key in keys.double())
    assert_close(second_moment(keys), expected)
    assert second_moment(keys).dtype == torch.float64
    assert_close(second_moment(keys[:3]) + second_moment(keys[3:]) + second_moment(keys[:0]), expected)


@pytest.mark.parametrize("num_keys", [RANK, 18, 60])
def test_projection_annihilates_the_retained_keys_and_nothing_else(num_keys: int) -> None:
    keys = rank_deficient(num_keys)
    space = null_space(second_moment(keys), threshold=1e-10, rule="max")
    projection = space.projection
    assert space.dimension == D_IN - RANK
    assert keys.abs().max() > 0.5  # what the projection has to remove
    assert_close(keys @ projection, torch.zeros_like(keys), rtol=0, atol=1e-12)
    assert_close(projection, projection.mT, rtol=0, atol=1e-15)
    assert_close(projection @ projection, projection, rtol=0, atol=1e-14)
    assert_close(projection.trace().item(), float(D_IN - RANK))
    assert torch.linalg.matrix_rank(torch.cat([keys, projection])) == D_IN


def test_eigenvalues_are_the_ascending_spectrum_of_the_moment() -> None:
    moment = moment_with(SPECTRUM)
    space = null_space(moment, threshold=0.5, rule="max")
    assert_close(space.eigenvalues, torch.tensor(SPECTRUM, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(space.basis.mT @ moment @ space.basis, space.eigenvalues[: space.dimension].diag(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "threshold", "dimension", "cutoff"),
    [
        ("max", 1e-3, 3, 1e-2 - 1e-12),  # 10 * 1e-3 = 0.01 is not below itself
        ("max", 0.5, 7, 5.0),
        ("max", 1.0, 7, 10.0),
        ("mean", 1e-5, 2, 1e-5 * sum(SPECTRUM) / 8),
        ("mean", 1.0, 6, sum(SPECTRUM) / 8),
        ("absolute", 2e-3, 4, 2e-2),  # num_keys = 10
        ("absolute", 100.0, 8, 1000.0),
        ("energy", 0.5, 7, 10.0),
        ("energy", 0.9, 6, 4.0),
        ("energy", 0.99, 5, 1.0),
        ("count", 1, 1, 1e-6),
        ("count", 3.0, 3, 1e-2),
    ],
)
def test_rules(rule: str, threshold: float, dimension: int, cutoff: float) -> None:
    spectrum = list(SPECTRUM)
    if rule == "max" and threshold == 1e-3:
        spectrum[3] = 0.01 + 1e-9  # keep the tie out of reach of rounding
    space = null_space(moment_with(spectrum), threshold, rule, num_keys=10)  # type: ignore[arg-type]
    assert space.dimension == dimension
    assert_close(space.cutoff, cutoff, rtol=1e-6, atol=1e-12)
    assert (space.eigenvalues < space.cutoff).sum() == dimension or rule in ("count", "energy")


@pytest.mark.parametrize("rule", ["max", "mean", "energy", "count"])
def test_relative_rules_ignore_the_number_of_keys_but_absolute_divides_by_it(rule: str) -> None:
    moment, threshold = moment_with(SPECTRUM), {"count": 2}.get(rule, 0.3)
    once, often = null_space(moment, threshold, rule), null_space(1000 * moment, threshold, rule)  # type: ignore[arg-type]
    assert once.dimension == often.dimension
    assert_close(once.projection, often.projection)
    absolute = null_space(moment, 0.05, "absolute", num_keys=1)
    assert null_space(1000 * moment, 0.05, "absolute", num_keys=1000).dimension == absolute.dimension
    assert null_space(1000 * moment, 0.05, "absolute", num_keys=1).dimension != absolute.dimension


def test_minimum_takes_the_smallest_where_the_rule_finds_fewer() -> None:
    moment = moment_with(SPECTRUM)
    assert null_space(moment, 1e-5, "mean").dimension == 2
    space = null_space(moment, 1e-5, "mean", minimum=4)
    assert space.dimension == 4
    assert_close(space.cutoff, 0.1)
    assert_close(space.projection, null_space(moment, 4, "count").projection)
    assert null_space(moment, 1e-5, "mean", minimum=1).dimension == 2
    assert null_space(moment, 1e-12, "mean", minimum=1).dimension == 1  # empty without


def test_empty_null_space_shows_the_spectrum_and_the_way_out() -> None:
    moment = moment_with([2.0, 3.0, 4.0, 7.0])
    with pytest.raises(EmptyNullSpaceError) as error:
        null_space(moment, 0.02, "max")
    message = str(error.value)
    for part in (
        "rule='max'",
        "threshold=0.02",
        "below 0.14",
        "is 2.",
        "0%: 2.86e-01 of max, 5.00e-01 of mean",
        "50%:",
    ):
        assert part in message
    assert "Raise the threshold" in message and "minimum" in message
    assert issubclass(EmptyNullSpaceError, ValueError)


@pytest.mark.parametrize("num_keys", [RANK, 18, D_IN, 60])
def test_thin_keys_give_the_null_space_of_their_moment(num_keys: int) -> None:
    keys = rank_deficient(num_keys)
    from_moment = null_space(second_moment(keys), 1e-10, "max")
    from_keys = null_space_from_keys(keys, 1e-10, "max")
    assert from_keys.dimension == from_moment.dimension == D_IN - RANK
    assert_close(from_keys.projection, from_moment.projection, rtol=0, atol=1e-12)
    assert_close(from_keys.eigenvalues, from_moment.eigenvalues, rtol=0, atol=1e-11)
    assert_close(from_keys.basis.mT @ from_keys.basis, torch.eye(D_IN - RANK, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "threshold"), [("max", 0.1), ("mean", 0.5), ("absolute", 0.3), ("energy", 0.8), ("count", 9)]
)
def test_every_rule_agrees_between_keys_and_moment(rule: str, threshold: float) -> None:
    keys = normal(40, D_IN, seed=4) * torch.linspace(0.1, 2, D_IN, dtype=torch.float64)
    from_moment = null_space(second_moment(keys), threshold, rule, num_keys=40)  # type: ignore[arg-type]
    from_keys = null_space_from_keys(keys, threshold, rule)  # type: ignore[arg-type]
    assert 0 < from_keys.dimension < D_IN
    assert_close(from_keys.projection, from_moment.projection, rtol=0, atol=1e-12)
    assert_close(from_keys.cutoff, from_moment.cutoff)


def test_keys_resolve_directions_that_their_moment_squares_away() -> None:
    keys = torch.eye(4, dtype=torch.float64)[:3] * torch.tensor([1.0, 1.0, 1e-10], dtype=torch.float64)[:, None]
    keys = keys @ torch.linalg.qr(normal(4, 4)).Q
    assert null_space_from_keys(keys, 1e-22, "max").dimension == 1
    assert null_space(second_moment(keys), 1e-15, "max").dimension == 2


@pytest.mark.parametrize(
    ("rule", "threshold", "match"),
    [
        ("smallest", 1.0, "rule='smallest' is unknown; choose one of max, mean"),
        ("max", 0.0, "threshold=0.0 must be positive"),
        ("max", 1.5, "at most 1 for 'max'"),
        ("mean", -1.0, "threshold=-1.0 must be positive"),
        ("mean", float("nan"), "threshold=nan must be a finite number"),
        ("absolute", 0.02, "pass num_keys"),
        ("energy", 1.0, "strictly between 0 and 1"),
        ("energy", 0.0, "strictly between 0 and 1"),
        ("count", 0, r"integer in \[1, 7\]"),
        ("count", 8, r"integer in \[1, 7\]"),
        ("count", 2.5, r"integer in \[1, 7\]"),
        ("count", float("inf"), "finite"),
    ],
)
def test_rejects_rule_and_threshold(rule: str, threshold: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        null_space(moment_with(SPECTRUM), threshold, rule)  # type: ignore[arg-type]


def test_rejects_what_is_not_a_second_moment() -> None:
    moment = moment_with(SPECTRUM)
    with pytest.raises(ValueError, match=r"moment has shape \(8, 7\), expected a square matrix"):
        null_space(moment[:, :7], 0.1, "max")
    with pytest.raises(ValueError, match=r"moment has shape \(8,\)"):
        null_space(moment[0], 0.1, "max")
    with pytest.raises(ValueError, match="not symmetric"):
        null_space(moment + normal(8, 8), 0.1, "max")
    with pytest.raises(ValueError, match="negative eigenvalue"):
        null_space(moment - torch.eye(8, dtype=torch.float64), 0.1, "max")
    with pytest.raises(ValueError, match="no retained keys, or all are zero"):
        null_space(torch.zeros(8, 8), 0.1, "max")
    with pytest.raises(ValueError, match="no retained keys, or all are zero"):
        null_space_from_keys(torch.zeros(0, 8), 0.1, "max")
    with pytest.raises(ValueError, match=r"minimum=8 must lie in \[0, 7\]"):
        null_space(moment, 0.1, "max", minimum=8)
    moment[2, 3] = float("nan")
    with pytest.raises(ValueError, match="moment holds 1 values that are not finite"):
        null_space(moment, 0.1, "max")
    with pytest.raises(ValueError, match="keys holds 2 values that are not finite"):
        second_moment(torch.tensor([[float("inf"), 1.0, float("nan")]]))


def test_rounding_below_zero_reads_as_zero() -> None:
    space = null_space(second_moment(rank_deficient(60)), 1e-10, "max")
    assert torch.linalg.eigvalsh(second_moment(rank_deficient(60))).min() < 0  # as LAPACK returns it
    assert space.eigenvalues.min() >= 0
    assert isinstance(space, NullSpaceBasis)
    with pytest.raises(AttributeError):
        space.cutoff = 0.0  # type: ignore[misc]
