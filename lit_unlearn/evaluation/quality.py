"""Measures how much an edit changes pictures that it should not change: each picture, and the set of all pictures.

Both measures compare pictures of the same prompts and seeds before and after the edit. Drift is paired, picture by
picture; the kernel distance (KID) and the Fréchet distance (FID) compare the sets.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

Features = Callable[[Tensor], Tensor]
"""Maps pictures (B, 3, H, W), float in [0, 1], to features (B, D)."""

FEATURES = ("judge", "inception")
"""Features that sets of pictures can be compared in."""


class PairedDrift(Metric):
    """Measures how much pictures have changed, in pixels and in a judge's features (as LPIPS does with a network's).

    Args:
        features: Features to compare in; None compares only pixels.
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
        """Add pairs of pictures (B, 3, H, W), float in [0, 1]."""
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
            ``rmse``: root-mean-square difference of a picture, as a fraction of full scale, averaged over pictures;
            ``psnr`` in dB, of the mean squared difference over all pictures (infinite if there is no difference);
            ``features``: mean cosine distance in features, if features are given; ``pictures``: number of pictures.
        """
        count = float(self.count)
        if not count:
            return {}
        mse = float(self.mse) / count
        drift = {"rmse": float(self.rmse) / count, "psnr": -10 * math.log10(mse) if mse else math.inf}
        if self.features is not None:
            drift["features"] = float(self.cosine) / count
        return {**drift, "pictures": int(count)}


def of_bytes(features: Features) -> Features:
    """Make ``features`` accept pictures (B, 3, H, W) in bytes, the type in which they are stored."""
    return lambda images: features(images.float() / 255)


def inception_features(device: str | torch.device = "cpu") -> Features:
    """Features (B, 2048) of Inception v3 for pictures in bytes, from torch-fidelity, as in published FIDs.

    Args:
        device: Device of the network.

    Raises:
        ValueError: torch-fidelity is not installed, or its weights are not available.
    """
    check_features("inception")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (OSError, RuntimeError, UnpicklingError) as error:  # no network; another file; a damaged one
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"features='inception' needs the weights {URL_INCEPTION_V3}, which cannot be loaded ({reason}): "
            f"put that file at {file}, or choose features='judge'."
        ) from error
    return network.to(device)


def check_features(features: str) -> None:
    """Check the name of the features that sets of pictures are compared in, without loading anything.

    Raises:
        ValueError: It is unknown, or torch-fidelity is missing.
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r} is unknown: choose {' or '.join(FEATURES)}.")
    if features == "inception" and importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("features='inception' needs torch-fidelity: pip install 'lit-unlearn[fid]'.")


class _Given(nn.Module):
    """Replaces the network that torchmetrics expects, since features are computed once for both distances."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features`` unchanged."""
        return features


class SetDistance:
    """KID (Bińkowski et al., 2018) and FID (Heusel et al., 2017) between pictures before and after an edit.

    Args:
        features: Maps pictures (B, 3, H, W), uint8, to features (B, D): ``of_bytes(judge.features)`` or
            ``inception_features()``.
        device: Device that collects the features.
    """

    def __init__(self, features: Features, device: str | torch.device = "cpu") -> None:
        self.features, self.device = features, torch.device(device)
        self.num_features = features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.device)).shape[1]
        given = _Given(self.num_features)
        with warnings.catch_warnings():  # it warns that features of very many pictures take memory
            warnings.filterwarnings("ignore", ".*will save all extracted features")
            self.kernel = KernelInceptionDistance(feature=given, subsets=50, subset_size=50).to(self.device)
        self.frechet = FrechetInceptionDistance(feature=given).to(self.device)

    @torch.no_grad()
    def update(self, before: Tensor, after: Tensor) -> None:
        """Add pictures (B, 3, H, W), uint8."""
        for pictures, real in ((before, True), (after, False)):
            features = self.features(pictures.to(self.device)).to(self.device)
            self.kernel.update(features, real=real)
            self.frechet.update(features.double(), real=real)

    def compute(self, seed: int = 0) -> dict[str, float | None]:
        """Compute the distances; every rank must call it.

        Args:
            seed: Seed of the subsets of KID; if there are fewer pictures than a subset holds, all are used.

        Returns:
            ``kid`` and ``kid_std``, mean and standard deviation over subsets, and ``fid``. ``fid`` is None unless there
            are more pictures than features, since otherwise the covariance is singular and the distance mostly reflects
            the small number of pictures. Empty if there are fewer than two pictures.
        """
        kernel = self.kernel
        kernel.sync(should_sync=torch.distributed.is_available() and torch.distributed.is_initialized())
        try:
            size = min(sum(map(len, kernel.real_features)), sum(map(len, kernel.fake_features)))
        finally:
            kernel.unsync(should_unsync=kernel._is_synced)
        if size < 2:
            return {}
        kernel.subset_size = min(50, size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mean, deviation = kernel.compute()
        fid = float(self.frechet.compute()) if size > self.num_features else None
        return {"kid": float(mean), "kid_std": float(deviation), "fid": fid}
