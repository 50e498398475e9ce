"""Figures for TensorBoard and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def spectrum_figure(spectra: Mapping[str, Sequence[float]], cutoffs: Mapping[str, float]) -> Figure:
    """Eigenvalues of ``K0 K0ᵀ`` per layer, relative to their mean; the part that spans the null space is dotted.

    Args:
        spectra: Eigenvalues of each layer, ascending.
        cutoffs: For each layer, the eigenvalue below which a direction belongs to the null space.

    Returns:
        A figure that is not opened in a window.
    """
    figure = Figure(figsize=(7, 4))  # without a layout engine, which takes longer than the drawing
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


def encoder_spectra_figure(
    spectra: Mapping[str, Mapping[str, Sequence[float]]], thresholds: Mapping[str, float]
) -> Figure:
    """Eigenvalues of ``K0 K0ᵀ`` with one panel for each kind of layer, relative to the mean of their layer.

    Layers differ in their number of inputs, so the index of an eigenvalue is shown as a share of that number.

    Args:
        spectra: Eigenvalues in ascending order, by kind (``text encoder``, ``UNet K, V``) and layer.
        thresholds: For each kind, the bound below which eigenvalues span the null space, relative to their mean.

    Returns:
        A figure that is not opened in a window.

    Raises:
        ValueError: There are no eigenvalues to draw, or a kind has no threshold.
    """
    if not spectra:
        raise ValueError("spectra is empty: pass the eigenvalues of at least one kind of layer.")
    if missing := [kind for kind in spectra if kind not in thresholds]:
        raise ValueError(f"thresholds lacks {', '.join(missing)}: pass one for each kind of layer.")
    figure = Figure(figsize=(4 * len(spectra), 4), layout="constrained")
    panels = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
    for axes, (kind, layers) in zip(panels, spectra.items(), strict=True):
        for label, values in layers.items():
            mean, size = sum(values) / len(values), len(values)
            places = [(number + 0.5) / size for number in range(size)]
            axes.semilogy(places, [max(value / mean, 1e-12) for value in reversed(values)], label=label)
        axes.axhline(thresholds[kind], color="black", linestyle="--", linewidth=1)
        axes.set_title(kind)
        axes.set_xlabel("part of the directions, largest first")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("eigenvalue of K0 K0ᵀ relative to the mean")
    return figure
