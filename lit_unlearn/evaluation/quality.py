"""What an edit does to pictures that it should leave alone: how far each moved, and how the set of them changed.

Both compare pictures of the same prompts and seeds before and after the edit. Drift is paired, picture by picture; the
kernel distance (KID) compares the sets.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.kid import KernelInceptionDistance

Features = Callable[[Tensor], Tensor]
"""From pictures (B, 3, H, W), float in [0, 1], to features (B, D)."""


class PairedDrift(Metric):
    """How far pictures moved: in pixels, and in a judge's features as LPIPS does in a network's.

    Args:
        features: Features to compare in; None leaves that out.
        **kwargs: Passed on to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    rmse: Tensor
    mse: Tensor
    cosine: Tensor
    count: Tensor

    def __init__(self, features: Features | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features
        for name in ("rmse", "mse", "cosine", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor) -> None:
        """Enter pairs of pictures (B, 3, H, W), float in [0, 1]."""
        mse = (after.double() - before.double()).square().flatten(1).mean(dim=1)
        self.mse += mse.sum().to(self.mse.device)
        self.rmse += mse.sqrt().sum().to(self.rmse.device)
        if self.features is not None:
            a, b = (nn.functional.normalize(self.features(x).double(), dim=1) for x in (before, after))
            self.cosine += (1 - (a * b).sum(dim=1)).sum().to(self.cosine.device)
        self.count += len(before)

    def compute(self) -> dict[str, float]:
        """Return the drift; empty if there were no pictures.

        Returns:
            ``rmse``: root-mean-square difference of a picture, in parts of full scale, averaged over pictures; ``psnr``
            in dB, of the mean squared difference of all (infinite if nothing moved); ``features``: cosine distance in
            features, averaged, if there are features; ``pictures``: how many.
        """
        count = float(self.count)
        if not count:
            return {}
        mse = float(self.mse) / count
        drift = {"rmse": float(self.rmse) / count, "psnr": -10 * math.log10(mse) if mse else math.inf}
        if self.features is not None:
            drift["features"] = float(self.cosine) / count
        return {**drift, "pictures": int(count)}


class _OfBytes(nn.Module):
    """Features as torchmetrics asks for them: of pictures in bytes."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of ``images`` (B, 3, H, W), uint8."""
        return self.features(images.float() / 255).to(images.device)


def kernel_distance(features: Features | None) -> KernelInceptionDistance:
    """KID (Bińkowski et al., 2018) in ``features``, or in Inception's if they are None.

    Raises:
        ValueError: There are no features, and torch-fidelity, which has Inception's, is not installed.
    """
    if features is not None:
        with warnings.catch_warnings():  # of the memory that features of very many pictures take
            warnings.filterwarnings("ignore", ".*will save all extracted features")
            return KernelInceptionDistance(feature=_OfBytes(features), subsets=50, subset_size=50)
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "KID needs features: take a classifier as judge, or install Inception's: pip install 'lit-unlearn[fid]'."
        )
    return KernelInceptionDistance(feature=2048, subsets=50, subset_size=50)


def compute_kernel_distance(metric: KernelInceptionDistance, seed: int = 0) -> dict[str, float]:
    """Mean and standard deviation over subsets, drawn from ``seed``; of fewer pictures than a subset all are taken.

    Returns:
        ``kid`` and ``kid_std``; empty if there are fewer than two pictures.
    """
    metric.sync(should_sync=torch.distributed.is_available() and torch.distributed.is_initialized())
    try:
        size = min(sum(map(len, metric.real_features)), sum(map(len, metric.fake_features)))
    finally:
        metric.unsync(should_unsync=metric._is_synced)
    if size < 2:
        return {}
    metric.subset_size = min(50, size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return {"kid": float(mean), "kid_std": float(deviation)}
