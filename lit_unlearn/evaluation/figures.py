"""Figures for TensorBoard and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def spectrum_figure(spectra: Mapping[str, Sequence[float]], cutoffs: Mapping[str, float]) -> Figure:
    """Eigenvalues of ``K0 K0ᵀ`` per layer, relative to their mean; dotted where they span the null space.

    Args:
        spectra: Eigenvalues of each layer, ascending.
        cutoffs: Eigenvalue below which a direction belongs to the null space, per layer.

    Returns:
        A figure that no window knows of.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in spectra.items():
        mean = sum(values) / len(values)
        relative = [max(value / mean, 1e-12) for value in reversed(values)]
        kept_out = sum(value >= cutoffs[name] for value in values)
        line = axes.semilogy(range(1, kept_out + 1), relative[:kept_out], label=name)[0]
        axes.semilogy(range(kept_out + 1, len(values) + 1), relative[kept_out:], ":", color=line.get_color())
    axes.set_xlabel("eigenvalue of K0 K0ᵀ, largest first (dotted: spans the null space)")
    axes.set_ylabel("relative to the mean")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
