"""The toy example of the paper's Appendix A.2: a mixture of normals after one component is unlearned.

    p(x) = sum_j alpha_j N(x; mu_j, 1), and component c is the concept.

It compares three densities without the concept: the ideal one (Eq. 8), the one that ESD's objective implies (Prop. 2),
and the density of samples that are guided away from the concept. ``python benchmarks/toy.py FILE`` draws the figure of
``docs/toy.md`` and prints its table. Everything is one-dimensional and in float64.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lit_unlearn.system.files import atomic_write

MARGIN = 10.0
"""Distance beyond the outermost means up to which densities are integrated: a unit normal has a tail below 1e-22 there.
"""
STEP = 0.01
"""Spacing of the integration grid, at which the trapezoidal rule is exact up to rounding for unit normals."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of unit normals.

    Attributes:
        weights: alpha, positive, with the sum 1.
        means: mu, one for each weight.

    Raises:
        ValueError: The weights are not positive with the sum 1, or there are not as many means.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.means) or not self.weights:
            raise ValueError(f"weights={self.weights} and means={self.means} must have one entry each per component.")
        if min(self.weights) <= 0 or not math.isclose(math.fsum(self.weights), 1.0, abs_tol=1e-9):
            raise ValueError(f"weights={self.weights} must be positive and have the sum 1.")

    def log_joint(self, x: Tensor, signal: float = 1.0) -> Tensor:
        """``log(alpha_j N(x; signal mu_j, 1))``, (n, components), of ``x`` (n,).

        With a diffusion model's noise, ``x_t = signal x_0 + (1 - signal^2)^(1/2) noise``, unit normals stay unit
        normals and their means are scaled by ``signal``.
        """
        weights, means = (torch.tensor(values, dtype=torch.float64) for values in (self.weights, self.means))
        distance = x.double().unsqueeze(-1) - signal * means
        return weights.log() - distance.square() / 2 - math.log(2 * math.pi) / 2

    def density(self, x: Tensor) -> Tensor:
        """``p(x)``, (n,)."""
        return self.log_joint(x).logsumexp(-1).exp()

    def cumulative(self, x: Tensor) -> Tensor:
        """Mass below ``x``, (n,)."""
        weights, means = (torch.tensor(values, dtype=torch.float64) for values in (self.weights, self.means))
        return torch.special.ndtr(x.double().unsqueeze(-1) - means) @ weights

    def posterior(self, x: Tensor, signal: float = 1.0) -> Tensor:
        """``p(z = j | x)``, (n, components)."""
        return self.log_joint(x, signal).softmax(-1)

    def without(self, concept: int) -> Mixture:
        """The ideal (Eq. 8): the other components, in the same proportions.

        Raises:
            ValueError: There is no such component, or it is the only one.
        """
        self.check(concept)
        kept = [j for j in range(len(self.weights)) if j != concept]
        if not kept:
            raise ValueError("The concept is the only component: give a mixture of at least two.")
        total = math.fsum(self.weights[j] for j in kept)
        return Mixture(tuple(self.weights[j] / total for j in kept), tuple(self.means[j] for j in kept))

    def check(self, concept: int) -> None:
        """Raise ``ValueError`` unless ``concept`` is the number of a component, counted from 0."""
        if not 0 <= concept < len(self.weights):
            raise ValueError(f"concept={concept} must lie in [0, {len(self.weights) - 1}]: it counts the components.")


EXAMPLE = Mixture((0.4, 0.3, 0.3), (-3.0, 0.0, 3.0))
"""The mixture of the figure. The paper gives no numbers."""
NOISE = Mixture((1.0,), (0.0,))
"""Initial noise of the samplers."""


def integrate(values: Tensor, x: Tensor) -> float:
    """Trapezoidal rule over ``x`` (n,)."""
    return float(torch.trapezoid(values, x))


def total_variation(first: Tensor, second: Tensor, x: Tensor) -> float:
    """Half the integral of the absolute difference of two densities at ``x`` (n,): 0 if equal, 1 without overlap."""
    return integrate((first - second).abs(), x) / 2


# --- the density that ESD implies


def esd_grid(mixture: Mixture, concept: int, eta: float) -> Tensor:
    """Points (n,) that cover all of ESD's density, which extends ``eta (mu_j - mu_c)`` beyond component j."""
    means = torch.tensor(mixture.means, dtype=torch.float64)
    reach = torch.cat([means, means + eta * (means - mixture.means[concept])])
    low, high = float(reach.min()) - MARGIN, float(reach.max()) + MARGIN
    return torch.linspace(low, high, math.ceil((high - low) / STEP) + 1, dtype=torch.float64)


def esd_density(mixture: Mixture, concept: int, eta: float, x: Tensor) -> Tensor:
    """The density that ESD's objective implies (Prop. 2): ``p(x) p(c|x)^-eta / Z``, (n,), at ``x`` (n,).

    With ``p(c|x) = alpha_c N(x; mu_c, 1) / p(x)`` it is ``p(x)^(eta + 1) (alpha_c N(x; mu_c, 1))^-eta / Z``, as in
    Appendix A.2: the exponent of the mixture is eta + 1. Z is found numerically.

    Args:
        mixture: p.
        concept: c.
        eta: ESD's strength; 0 returns the density of the mixture.
        x: Points at which to evaluate.

    Raises:
        ValueError: eta is negative or not finite, or there is no such component.
    """
    mixture.check(concept)
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta={eta} must be a finite number, zero or larger.")

    def log_unnormalised(points: Tensor) -> Tensor:
        joint = mixture.log_joint(points)
        return (eta + 1) * joint.logsumexp(-1) - eta * joint[:, concept]

    grid = esd_grid(mixture, concept, eta)
    values = log_unnormalised(grid)
    peak = values.max()
    return (log_unnormalised(x) - peak).exp() / integrate((values - peak).exp(), grid)


def esd_mixture(mixture: Mixture, concept: int, eta: int) -> Mixture:
    """ESD's density for an integer eta in closed form, again a mixture of unit normals.

    ``p^(eta + 1)`` expands into terms ``prod_j (alpha_j N_j)^k_j`` with ``sum_j k_j = eta + 1``. Each of them, times
    ``(alpha_c N_c)^-eta``, is a unit normal around ``m = sum_j k_j mu_j - eta mu_c`` with a weight proportional to
    ``(eta + 1)! / prod_j k_j!  prod_j alpha_j^k_j  alpha_c^-eta  exp((m^2 - sum_j k_j mu_j^2 + eta mu_c^2) / 2)``.

    Raises:
        ValueError: eta is not a whole number, or there is no such component.
    """
    mixture.check(concept)
    if eta != int(eta) or eta < 0:
        raise ValueError(f"eta={eta} must be a whole number, zero or larger: only then does the power expand.")
    components = range(len(mixture.weights))
    log_weights, means = [], []
    for chosen in itertools.combinations_with_replacement(components, int(eta) + 1):
        orders = math.lgamma(eta + 2) - math.fsum(math.lgamma(chosen.count(j) + 1) for j in components)
        powers = [chosen.count(j) - eta * (j == concept) for j in components]
        mean = math.fsum(power * mu for power, mu in zip(powers, mixture.means, strict=True))
        squares = math.fsum(power * mu**2 for power, mu in zip(powers, mixture.means, strict=True))
        shares = math.fsum(power * math.log(alpha) for power, alpha in zip(powers, mixture.weights, strict=True))
        log_weights.append(orders + shares + (mean**2 - squares) / 2)
        means.append(mean)
    weights = torch.tensor(log_weights, dtype=torch.float64).softmax(0).tolist()
    kept = [(weight, mean) for weight, mean in zip(weights, means, strict=True) if weight > 0]  # others underflow
    return Mixture(tuple(weight for weight, _ in kept), tuple(mean for _, mean in kept))


# --- samplers guided away from the concept


def ideal_strength(
    mixture: Mixture, concept: int, x: Tensor, signal: float = 1.0, prior: float | None = None
) -> Tensor:
    """The strength (n,) for which ESD's guidance would sample from the ideal: the odds ``p(c|x) / (1 - p(c|x))``.

    ``p = alpha_c p(.|c) + (1 - alpha_c) p'`` and noise is linear, so at every noise level the ideal's score is
    ``s' = (s - p(c|x) s_c) / (1 - p(c|x)) = s - odds (s_c - s)``.

    Args:
        mixture: p.
        concept: c.
        x: Points at which to evaluate, (n,).
        signal: 1 without noise, 0 for pure noise.
        prior: Value assumed for alpha_c, at most alpha_c itself; None takes alpha_c.

    Raises:
        ValueError: There is no such component, or ``prior`` is larger than its weight.
    """
    mixture.check(concept)
    share = mixture.weights[concept]
    if prior is not None and not 0 <= prior <= share:
        raise ValueError(f"prior={prior} must lie in [0, {share}]: beyond it p - prior p(.|c) is negative somewhere.")
    scale = 1.0 if prior is None else prior / share
    posterior = mixture.posterior(x, signal)
    others = [j for j in range(len(mixture.weights)) if j != concept]
    # Not 1 - p(c|x), which would be rounded to zero deep inside the concept.
    return scale * posterior[:, concept] / (posterior[:, others].sum(-1) + (1 - scale) * posterior[:, concept])


def guided_samples(
    mixture: Mixture,
    concept: int,
    eta: float | None,
    starts: Tensor,
    prior: float | None = None,
    num_steps: int = 50,
) -> Tensor:
    """Samples (n,) of a sampler that starts from the noise ``starts`` (n,) and is guided away from the concept.

    At every noise level the score is ``s - eta (s_c - s)``, which is ESD's target. In terms of the signal a, from 0 to
    1, the probability-flow equation of this mixture is ``dx/da = m - eta (mu_c - m)`` with
    ``m = sum_j p_a(z = j | x) mu_j``.

    Args:
        mixture: p.
        concept: c.
        eta: A constant; None takes ``ideal_strength`` at each place and noise level.
        starts: Standard normal noise; a larger start gives a larger sample, since paths of the flow cannot cross.
        prior: As in ``ideal_strength``.
        num_steps: Steps of the fourth-order Runge-Kutta method.
    """
    mixture.check(concept)
    means = torch.tensor(mixture.means, dtype=torch.float64)

    def velocity(x: Tensor, signal: float) -> Tensor:
        posterior = mixture.posterior(x, signal)
        strength = ideal_strength(mixture, concept, x, signal, prior) if eta is None else eta
        # mu_c - m as a sum of differences: the concept's own is zero, so nothing cancels deep inside the concept.
        return posterior @ means - strength * (posterior @ (means[concept] - means))

    x, size = starts.double(), 1 / num_steps
    for step in range(num_steps):
        signal = step * size
        first = velocity(x, signal)
        second = velocity(x + size / 2 * first, signal + size / 2)
        third = velocity(x + size / 2 * second, signal + size / 2)
        fourth = velocity(x + size * third, signal + size)
        x = x + size / 6 * (first + 2 * second + 2 * third + fourth)
    return x


def sampled_density(
    mixture: Mixture, concept: int, eta: float | None, prior: float | None = None
) -> tuple[Tensor, Tensor]:
    """Density of ``guided_samples``: places (n,), increasing, and its values there, (n,).

    In one dimension quantiles keep their order, so the density is that of the noise divided by the flow's slope.
    """
    starts = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    ends = guided_samples(mixture, concept, eta, starts, prior)
    (slope,) = torch.gradient(ends, spacing=(starts,))
    return ends, NOISE.density(starts) / slope


# --- table and figure


def summary(mixture: Mixture, concept: int, etas: Sequence[float]) -> list[dict[str, float]]:
    """Distances from the ideal to ESD's density and to the density of its sampler, for each eta.

    Returns:
        Per eta: ``distance`` and ``sampled_distance``, total variations to the ideal; ``concept`` and
        ``sampled_concept``, the concept's share according to a perfect judge (see ``judged_share``).
    """
    ideal, rows = mixture.without(concept), []
    for eta in etas:
        grid = esd_grid(mixture, concept, eta)
        row = {"eta": float(eta)}
        density = esd_density(mixture, concept, eta, grid)
        for prefix, x, values in (("", grid, density), ("sampled_", *sampled_density(mixture, concept, eta))):
            row[f"{prefix}distance"] = total_variation(values, ideal.density(x), x)
            row[f"{prefix}concept"] = judged_share(mixture, concept, values, x)
        rows.append(row)
    return rows


def judged_share(mixture: Mixture, concept: int, density: Tensor, x: Tensor) -> float:
    """Mean of ``p(c|x)`` under ``density`` (n,) at ``x`` (n,): c's share according to a judge who knows ``mixture``.

    It is not zero for the ideal, whose components overlap with the concept.
    """
    return integrate(density * mixture.posterior(x)[:, concept], x)


GREY, BLUE, ORANGE = "#777777", "#0072B2", "#D55E00"
GREEN, SKY, PINK = "#009E73", "#56B4E9", "#CC79A7"
"""Colours of Okabe and Ito, which colour-blind people can distinguish."""


def toy_figure(mixture: Mixture = EXAMPLE, edge: int = 2, middle: int = 1) -> Figure:
    """Six panels: the mixture, ESD's density for a concept at the edge and for one in the middle, and the samplers.

    Args:
        mixture: The mixture from which components are unlearned.
        edge: The concept of all panels except the third: a component that is not between others.
        middle: The concept of the third panel: a component between others.

    Returns:
        A figure that does not belong to a window.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    _draw_mixture(panels[0], mixture, edge)
    _draw_esd(panels[1], mixture, edge, "b  ESD's density, concept at the edge")
    _draw_esd(panels[2], mixture, middle, "c  ESD's density, concept in the middle")
    _draw_distance(panels[3], mixture, edge, middle)
    _draw_strength(panels[4], mixture, edge)
    _draw_samples(panels[5], mixture, edge)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    return figure


def _draw_mixture(axes: Axes, mixture: Mixture, concept: int) -> None:
    x = esd_grid(mixture, concept, 0.0)
    part = mixture.log_joint(x)[:, concept].exp()
    axes.fill_between(x.numpy(), part.numpy(), color=ORANGE, alpha=0.3, label="the concept's part")
    axes.plot(x, mixture.density(x), color=GREY, label="mixture p")
    _plot_ideal(axes, mixture, concept, x)
    axes.set(title="a  what there is, and what should remain", xlabel="x", ylabel="density", xlim=(-8, 8))


def _draw_esd(axes: Axes, mixture: Mixture, concept: int, title: str) -> None:
    x = esd_grid(mixture, concept, 1.0)
    for eta, color, style in ((0.1, SKY, "-"), (0.25, GREEN, "-."), (0.5, PINK, "--"), (1.0, ORANGE, "-")):
        axes.plot(x, esd_density(mixture, concept, eta, x), style, color=color, label=f"ESD, η = {eta:g}")
    _plot_ideal(axes, mixture, concept, x)
    axes.axvline(mixture.means[concept], color=GREY, linewidth=0.8, label="the concept's mean")
    axes.set(title=title, xlabel="x", ylabel="density", xlim=(float(x[0]) + 6, float(x[-1]) - 5), ylim=(-0.02, 0.46))


def _draw_distance(axes: Axes, mixture: Mixture, edge: int, middle: int) -> None:
    etas = (0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5)
    for concept, color, label in ((edge, ORANGE, "edge"), (middle, BLUE, "middle")):
        rows = summary(mixture, concept, etas)
        axes.plot(etas, [row["distance"] for row in rows], color=color, label=f"ESD's density, {label}")
        axes.plot(etas, [row["sampled_distance"] for row in rows], "--", color=color, label=f"its sampler, {label}")
    axes.set(title="d  distance to the ideal", xlabel="η", ylabel="total variation", ylim=(0, 1.02))


def _draw_strength(axes: Axes, mixture: Mixture, concept: int) -> None:
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    for signal, color, style in ((1.0, BLUE, "-"), (0.7, GREEN, "-."), (0.4, PINK, "--"), (0.1, SKY, ":")):
        strength = ideal_strength(mixture, concept, x, signal)
        axes.semilogy(x, strength, style, color=color, label=f"ideal, signal {signal:g}")
    axes.axhline(1.0, color=ORANGE, label="ESD, η = 1")
    axes.set(title="e  strength that draws the ideal", xlabel="x at that noise level", ylabel="η(x)", ylim=(1e-4, 1e4))


def _draw_samples(axes: Axes, mixture: Mixture, concept: int) -> None:
    _plot_ideal(axes, mixture, concept, esd_grid(mixture, concept, 1.0))
    for eta, color, style in ((0.25, GREEN, "-."), (1.0, ORANGE, "-"), (None, SKY, "-")):
        label = "η(x), the posterior odds" if eta is None else f"constant η = {eta:g}"
        axes.plot(*sampled_density(mixture, concept, eta), style, color=color, label=label, zorder=1)
    axes.set(title="f  what a guided sampler draws", xlabel="x", ylabel="density", xlim=(-14, 14))


def _plot_ideal(axes: Axes, mixture: Mixture, concept: int, x: Tensor) -> None:
    ideal = mixture.without(concept).density(x)
    axes.plot(x, ideal, ":", color="black", linewidth=2, label="ideal p′", zorder=3)


def main(arguments: Sequence[str]) -> int:
    """Write the figure to the file given as the only argument, and print the table of ``docs/toy.md``."""
    if len(arguments) != 1:
        print("usage: python benchmarks/toy.py FIGURE.png", file=sys.stderr)
        return 2
    with atomic_write(arguments[0]) as file:
        # Without the version of matplotlib, so that the same figure gives the same file.
        toy_figure().savefig(file, format="png", dpi=80, metadata={"Software": None})
    columns = ("eta", "distance", "sampled_distance", "concept", "sampled_concept")
    for concept, place in ((2, "edge"), (1, "middle")):
        print(f"\nconcept at the {place}\n" + "".join(f"{column:>18}" for column in columns))
        for row in summary(EXAMPLE, concept, (0, 0.05, 0.1, 0.25, 0.5, 1, 2)):
            print("".join(f"{row[column]:18.3f}" for column in columns))
        ideal, grid = EXAMPLE.without(concept), esd_grid(EXAMPLE, concept, 0)
        print(f"concept in the ideal: {judged_share(EXAMPLE, concept, ideal.density(grid), grid):.3f}")
        starts = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        drawn = ideal.cumulative(guided_samples(EXAMPLE, concept, None, starts))
        error = float((drawn - NOISE.cumulative(starts)).abs().max())
        print(f"posterior odds as strength: cumulative distribution off the ideal's by at most {error:.0e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
