"""Closed-form edits against the papers' literal formulas, brute-force minimisers and the guarantees they state.

Everything runs in float64, so tolerances of 1e-10 to 1e-12 are a few hundred roundings wide.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import normal
from lit_unlearn.core.closed_form import (
    NullSpaceBasis,
    edit_report,
    least_squares_condition,
    least_squares_update,
    null_space,
    null_space_from_keys,
    null_space_update,
    ridge_map_update,
    second_moment,
)
from lit_unlearn.diffusion.footprint import peak_bytes

D_OUT, D_IN, RANK = 6, 20, 9


WEIGHT = normal(D_OUT, D_IN, seed=1)
RETAINED = normal(50, RANK, seed=2) @ normal(RANK, D_IN, seed=3)  # uses 9 of the 20 input directions
IDENTITY = torch.eye(D_IN, dtype=torch.float64)

# Fewer keys than null-space directions (n x n system), between k and d_in, and more keys than inputs (k x k system).
NUM_KEYS = [1, 4, 15, 45]


def edit(num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys with a component in the retained span, and values for them."""
    return normal(num_keys, D_IN, seed=4), normal(num_keys, D_OUT, seed=5)


def space() -> NullSpaceBasis:
    return null_space(second_moment(RETAINED), 1e-10, "max")


def literal_update(keys: Tensor, values: Tensor, projection: Tensor, ridge: float, previous: Tensor | float) -> Tensor:
    """The formula as printed, in the paper's column layout."""
    k1, v1 = keys.T, values.T
    residual = v1 - WEIGHT @ k1
    return residual @ k1.T @ projection @ torch.linalg.inv((k1 @ k1.T + previous) @ projection + ridge * IDENTITY)


def null_space_objective(delta: Tensor, keys: Tensor, values: Tensor, ridge: float) -> Tensor:
    return ((WEIGHT + delta) @ keys.T - values.T).square().sum() + ridge * delta.square().sum()


@pytest.mark.parametrize("num_keys", NUM_KEYS)
@pytest.mark.parametrize("ridge", [1.0, 0.03])
@pytest.mark.parametrize("form", ["basis", "matrix"])
def test_null_space_update_equals_the_formula_of_the_paper(num_keys: int, ridge: float, form: str) -> None:
    keys, values = edit(num_keys)
    projection = space().projection
    delta = null_space_update(WEIGHT, keys, values, space() if form == "basis" else projection, ridge)
    expected = literal_update(keys, values, projection, ridge, previous=0.0)
    assert expected.abs().max() > 1e-2
    assert_close(delta, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_previous_edits_enter_as_in_alphaedit(num_keys: int) -> None:
    keys, values = edit(num_keys)
    previous_keys = normal(7, D_IN, seed=6)
    previous = second_moment(previous_keys)
    projection = space().projection
    expected = literal_update(keys, values, projection, 1.0, previous)
    for form in (space(), projection):
        assert_close(null_space_update(WEIGHT, keys, values, form, 1.0, previous_moment=previous), expected)
    # AlphaEdit's code solves the transposed system [P (K1 K1' + Kp Kp') + L2 I] X = P K1 R'.
    system = projection @ (keys.T @ keys + previous) + IDENTITY
    transposed = torch.linalg.solve(system, projection @ keys.T @ (values - keys @ WEIGHT.T)).T
    assert_close(transposed, expected)
    unaware = null_space_update(WEIGHT, keys, values, space())
    assert (previous_keys @ expected.T).norm() < (previous_keys @ unaware.T).norm()


@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_update_leaves_retained_outputs_unchanged(num_keys: int) -> None:
    keys, values = edit(num_keys)
    delta = null_space_update(WEIGHT, keys, values, space())
    before, after = RETAINED @ WEIGHT.mT, RETAINED @ (WEIGHT + delta).mT
    assert_close(after, before, rtol=0, atol=1e-12)
    assert_close(delta @ space().projection, delta, rtol=0, atol=1e-14)
    # Neither is true without the projection.
    unconstrained = null_space_update(WEIGHT, keys, values, IDENTITY)
    assert (RETAINED @ unconstrained.mT).abs().max() > 0.1
    assert (unconstrained @ space().projection - unconstrained).abs().max() > 1e-2
    # The edit does bring the outputs nearer to the values.
    assert (values - keys @ (WEIGHT + delta).mT).norm() < 0.95 * (values - keys @ WEIGHT.mT).norm()


def test_update_reaches_the_values_as_the_ridge_vanishes() -> None:
    keys, values = edit(4)  # fewer keys than the 11 free directions, so the values can be met exactly
    delta = null_space_update(WEIGHT, keys, values, space(), ridge=0.0)
    assert_close(keys @ (WEIGHT + delta).mT, values, rtol=0, atol=1e-11)
    assert_close(RETAINED @ delta.mT, torch.zeros(50, D_OUT, dtype=torch.float64), rtol=0, atol=1e-11)
    strong = null_space_update(WEIGHT, keys, values, space(), ridge=1e9)
    assert strong.abs().max() < 1e-6


@pytest.mark.parametrize("num_keys", NUM_KEYS)
@pytest.mark.parametrize("ridge", [1.0, 0.3])
def test_update_is_stationary_in_the_null_space(num_keys: int, ridge: float) -> None:
    keys, values = edit(num_keys)
    gradients = []
    for delta in (null_space_update(WEIGHT, keys, values, space(), ridge), torch.zeros_like(WEIGHT)):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(null_space_objective(delta, keys, values, ridge), delta)
        # The objective is over D = D P: only the part of the gradient in the range of P has to vanish.
        gradients.append((gradient @ space().projection).abs().max().item())
    assert gradients[0] < 1e-10
    assert gradients[1] > 1


def test_update_is_where_lbfgs_ends() -> None:
    keys, values = edit(15)
    projection, free = space().projection, torch.zeros_like(WEIGHT, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = null_space_objective(free @ projection, keys, values, ridge=1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (free @ projection).detach()
    assert_close(
        null_space_update(WEIGHT, keys, values, space()), found, rtol=0, atol=1e-7
    )  # its line search compares losses


@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_mean_diagonal_ridge_follows_the_scale_of_the_keys(num_keys: int) -> None:
    keys, values = edit(num_keys)
    projected = keys @ space().projection
    scale = (projected @ keys.T).diagonal().mean().item()
    expected = null_space_update(WEIGHT, keys, values, space(), ridge=0.1 * scale)
    relative = null_space_update(WEIGHT, keys, values, space(), 0.1, "mean_diagonal")
    assert_close(relative, expected)
    # Keys ten times as large, with outputs ten times as large, ask for the same map.
    scaled = null_space_update(WEIGHT, 10 * keys, 10 * values, space(), 0.1, "mean_diagonal")
    assert_close(scaled, relative)
    assert (null_space_update(WEIGHT, 10 * keys, 10 * values, space(), 0.1) - relative).abs().max() > 1e-3


def test_mean_diagonal_needs_keys_with_a_part_in_the_null_space() -> None:
    keys, values = RETAINED[:4], normal(4, D_OUT)
    with pytest.raises(ValueError, match="lie in the span of the retained keys"):
        null_space_update(WEIGHT, keys, values, space(), 1.0, "mean_diagonal")
    assert null_space_update(WEIGHT, keys, values, space(), 1.0).abs().max() < 1e-12


@pytest.mark.parametrize("num_keys", NUM_KEYS)
@pytest.mark.parametrize(("ridge", "retain_weight"), [(0.0, 1.0), (0.5, 3.0)])
def test_least_squares_update_is_the_brute_force_minimiser(num_keys: int, ridge: float, retain_weight: float) -> None:
    keys, values = edit(num_keys)
    retained = normal(30, D_IN, seed=8)
    delta = least_squares_update(WEIGHT, keys, values, second_moment(retained), ridge, retain_weight)
    # The three terms of the objective as one tall system for D^T.
    rows = torch.cat([keys, retain_weight**0.5 * retained, ridge**0.5 * IDENTITY])
    zeros = torch.zeros(30 + D_IN, D_OUT, dtype=torch.float64)
    minimiser = torch.linalg.lstsq(rows, torch.cat([values - keys @ WEIGHT.T, zeros])).solution.T
    assert_close(delta, minimiser, rtol=0, atol=1e-11)
    k1 = keys.T
    literal = (values.T - WEIGHT @ k1) @ k1.T
    literal = literal @ torch.linalg.inv(retain_weight * retained.T @ retained + k1 @ k1.T + ridge * IDENTITY)
    assert_close(delta, literal, rtol=0, atol=1e-11)
    assert (retained @ delta.T).abs().max() > 1e-2  # it does disturb the retained outputs


def test_memit_is_least_squares_on_the_mean_second_moment() -> None:
    keys, values = edit(4)
    retained = normal(30, D_IN, seed=8)
    moment = second_moment(retained)
    k1, covariance = keys.T, moment / 30
    expected = (values.T - WEIGHT @ k1) @ torch.linalg.solve(15000 * covariance + k1 @ k1.T, k1).T
    assert_close(least_squares_update(WEIGHT, keys, values, covariance, retain_weight=15000), expected)


def test_heavily_retained_least_squares_tends_to_the_null_space_edit() -> None:
    keys, values = edit(4)
    constrained = null_space_update(WEIGHT, keys, values, space(), ridge=1.0)
    differences = [
        (least_squares_update(WEIGHT, keys, values, second_moment(RETAINED), 1.0, weight) - constrained).norm().item()
        for weight in (1.0, 1e2, 1e4)
    ]
    # Like 1 / retain_weight; from about 1e6 on the condition of the system spoils it, which the projection avoids.
    assert differences[0] > 1e-2
    assert differences[0] == pytest.approx(1e2 * differences[1], rel=0.05)
    assert differences[1] == pytest.approx(1e2 * differences[2], rel=0.05)


@pytest.mark.parametrize("update", ["least_squares", "null_space"])
def test_singular_system_asks_for_a_ridge(update: str) -> None:
    keys, values = edit(4)
    repeated_keys, repeated_values = torch.cat([keys, keys]), torch.cat([values, values])
    with pytest.raises(ValueError, match=r"singular with ridge=0.*larger ridge"):
        if update == "least_squares":
            least_squares_update(WEIGHT, keys, values, second_moment(RETAINED), ridge=0.0)  # rank 13 of 20
        else:
            null_space_update(WEIGHT, repeated_keys, repeated_values, space(), ridge=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_updates_come_back_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight, keys, values = WEIGHT.to(dtype), *(tensor.to(dtype) for tensor in edit(4))
    exact = [tensor.double() for tensor in (weight, keys, values)]
    moment = second_moment(normal(30, D_IN, seed=8))
    for update in (
        lambda w, k, v: null_space_update(w, k, v, space()),
        lambda w, k, v: least_squares_update(w, k, v, moment),
        lambda w, k, v: ridge_map_update(w, k, v, RETAINED[:5]),
    ):
        result = update(weight, keys, values)
        assert result.dtype == dtype
        # Only the cast of the result rounds: nothing is solved in half precision.
        assert_close(result, update(*exact).to(dtype), rtol=0, atol=0)


def test_a_null_space_in_float32_is_a_projector_and_half_of_one_is_not() -> None:
    keys, values = edit(4)
    projection = space().projection
    exact = null_space_update(WEIGHT, keys, values, space())
    assert_close(null_space_update(WEIGHT, keys, values, projection.float()), exact, rtol=0, atol=1e-5)
    for wrong in (0.5 * projection, projection + normal(D_IN, D_IN), projection.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="not an orthogonal projector"):
            null_space_update(WEIGHT, keys, values, wrong)


def test_report_equals_brute_force() -> None:
    keys, values = edit(4)
    moment = second_moment(RETAINED)
    leaky = null_space(moment, 0.2, "max")  # keeps directions that the retained keys use
    delta = null_space_update(WEIGHT, keys, values, leaky, ridge=0.5)
    report = edit_report(WEIGHT, delta, keys, moment, leaky, ridge=0.5)
    projection = leaky.projection
    eigenvalues = torch.linalg.eigvalsh(keys @ projection @ keys.T + 0.5 * torch.eye(4, dtype=torch.float64))
    expected = {
        "null_space_dimension": float(leaky.dimension),
        "keys_kept": ((keys @ projection).norm() / keys.norm()).item(),
        "retained_kept": ((RETAINED @ projection).norm() / RETAINED.norm()).item(),
        "leak": ((RETAINED @ delta.T).norm() / (RETAINED @ WEIGHT.T).norm()).item(),
        "relative_norm": (delta.norm() / WEIGHT.norm()).item(),
        "condition_number": (eigenvalues[-1] / eigenvalues[0]).item(),
    }
    assert leaky.dimension > D_IN - RANK
    assert report["leak"] > 1e-3 and report["retained_kept"] > 1e-3
    assert report.keys() == expected.keys()
    assert all(type(value) is float for value in report.values())
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-6 if name == "leak" else 1e-9), name  # ||W K0|| is float32


def test_report_of_an_exact_null_space_is_zero_to_the_resolution_of_a_moment() -> None:
    keys, values = edit(4)
    delta = null_space_update(WEIGHT, keys, values, space())
    report = edit_report(WEIGHT, delta, keys, second_moment(RETAINED), space())
    assert report["leak"] < 1e-7 and report["retained_kept"] < 1e-7  # square roots of roundings
    assert 0.1 < report["keys_kept"] < 1
    rounded = (WEIGHT + delta).to(torch.bfloat16).double() - WEIGHT
    assert edit_report(WEIGHT, rounded, keys, second_moment(RETAINED), space())["leak"] > 1e-4


@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_report_takes_the_condition_of_the_system_that_is_solved(num_keys: int) -> None:
    keys, values = edit(num_keys)
    moment, previous = second_moment(RETAINED), second_moment(normal(3, D_IN, seed=6))
    delta = null_space_update(WEIGHT, keys, values, space(), 2.0, "mean_diagonal", previous)
    report = edit_report(WEIGHT, delta, keys, moment, space(), 2.0, "mean_diagonal", previous)
    basis = space().basis
    ridge = 2.0 * (keys @ basis).square().sum() / num_keys
    system = basis.T @ (keys.T @ keys + previous) @ basis + ridge * torch.eye(basis.shape[1], dtype=torch.float64)
    assert report["condition_number"] == pytest.approx(torch.linalg.cond(system).item(), rel=1e-9)


@pytest.mark.parametrize(("ridge", "retain_weight"), [(0.1, 1.0), (1e-6, 15.0), (2.0, 0.0)])
def test_condition_of_least_squares_is_that_of_its_system(ridge: float, retain_weight: float) -> None:
    keys, moment = edit(4)[0], second_moment(RETAINED)
    system = retain_weight * moment + keys.T @ keys + ridge * torch.eye(D_IN, dtype=torch.float64)
    expected = pytest.approx(torch.linalg.cond(system).item(), rel=1e-5)  # one of 1e10 is known to 1e10 roundings
    assert least_squares_condition(keys, moment, ridge, retain_weight) == expected
    assert least_squares_condition(torch.zeros(1, D_IN), moment * 0, 0.0) == math.inf


def test_thin_and_streamed_statistics_give_the_same_edit() -> None:
    keys, values = edit(15)
    retained = RETAINED[:12]
    thin = null_space_update(WEIGHT, keys, values, null_space_from_keys(retained, 1e-10, "max"))
    streamed = sum(second_moment(batch) for batch in retained.split(5))
    assert isinstance(streamed, Tensor)
    assert_close(null_space_update(WEIGHT, keys, values, null_space(streamed, 1e-10, "max")), thin)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keys": normal(4, D_IN + 1)}, r"keys has shape \(4, 21\), expected \(\*, 20\)"),
        ({"keys": normal(2, 2, D_IN)}, r"keys has shape \(2, 2, 20\).*flatten batches"),
        ({"keys": normal(0, D_IN), "values": normal(0, D_OUT)}, "keys is empty"),
        ({"values": normal(3, D_OUT)}, r"values has shape \(3, 6\), expected \(4, 6\)"),
        ({"values": normal(4, D_OUT) / 0}, "values holds 24 values that are not finite"),
        ({"weight": normal(D_OUT)}, r"weight has shape \(6,\)"),
        ({"weight": WEIGHT * float("nan")}, "weight holds 120 values that are not finite"),
        ({"projection": normal(D_IN, 3)}, r"projection has shape \(20, 3\), expected \(20, 20\)"),
        ({"projection": null_space(second_moment(normal(2, 5)), 1, "count")}, r"projection.basis has shape \(5, 1\)"),
        ({"ridge": -1.0}, "ridge=-1.0 must be a finite number, zero or larger"),
        ({"ridge_rule": "trace"}, "ridge_rule='trace' is unknown; choose one of absolute, mean_diagonal"),
        ({"previous_moment": normal(4, D_IN)}, "previous_moment has shape"),
        ({"previous_moment": normal(D_IN, D_IN)}, "previous_moment is not symmetric"),
    ],
)
def test_null_space_update_names_what_does_not_fit(change: dict, match: str) -> None:
    keys, values = edit(4)
    arguments = {"weight": WEIGHT, "keys": keys, "values": values, "projection": space()} | change
    with pytest.raises(ValueError, match=match):
        null_space_update(**arguments)


def test_least_squares_and_uce_name_what_does_not_fit() -> None:
    keys, values = edit(4)
    with pytest.raises(ValueError, match=r"retained_moment has shape \(50, 20\), expected \(20, 20\)"):
        least_squares_update(WEIGHT, keys, values, RETAINED)
    with pytest.raises(ValueError, match="retain_weight=-2 must be"):
        least_squares_update(WEIGHT, keys, values, IDENTITY, retain_weight=-2)
    with pytest.raises(ValueError, match=r"preserved_keys has shape \(3, 5\), expected \(\*, 20\)"):
        ridge_map_update(WEIGHT, keys, values, normal(3, 5))
    with pytest.raises(ValueError, match="erase_scale=0 must be a positive number"):
        ridge_map_update(WEIGHT, keys, values, erase_scale=0)
    with pytest.raises(ValueError, match="lamb=-1 must be"):
        ridge_map_update(WEIGHT, keys, values, lamb=-1)
    with pytest.raises(ValueError, match="preserve_scale=nan must be"):
        ridge_map_update(WEIGHT, keys, values, preserve_scale=float("nan"))


def test_few_keys_need_no_square_matrix_besides_the_basis() -> None:
    d_in, d_out, num_keys = 1500, 20, 12  # T5-XXL's wo has 10240 inputs: a square matrix of them has 839 MB
    space = NullSpaceBasis(torch.eye(d_in, dtype=torch.float64)[:, 50:].contiguous(), torch.zeros(d_in), 1.0)
    weight, keys, values = normal(d_out, d_in), normal(num_keys, d_in), normal(num_keys, d_out)
    given = torch.nn.ParameterList([space.basis, weight, keys, values]).requires_grad_(False)
    held = peak_bytes([given], lambda: null_space_update(weight, keys, values, space))
    assert 0 < held < 8 * d_in**2 / 2
