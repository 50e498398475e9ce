from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_unlearn.evaluation.quality import PairedDrift, compute_kernel_distance, kernel_distance


def pictures(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def means(images: Tensor) -> Tensor:
    """Mean colours, (B, 3): features that a person can follow."""
    return images.mean(dim=(2, 3))


def test_drift_equals_a_plain_computation_in_any_batches() -> None:
    before, after = pictures(5, 0), pictures(5, 1)
    metric = PairedDrift(means)
    for part in ((0, 2), (2, 5)):
        metric.update(before[slice(*part)], after[slice(*part)])
    drift = metric.compute()
    mse = [float((b - a).double().square().mean()) for b, a in zip(before, after, strict=True)]
    assert drift["rmse"] == pytest.approx(sum(math.sqrt(m) for m in mse) / 5, rel=1e-6)
    assert drift["psnr"] == pytest.approx(10 * math.log10(5 / sum(mse)), rel=1e-6)
    distances = [
        1 - float(torch.nn.functional.cosine_similarity(means(b[None]).double(), means(a[None]).double()))
        for b, a in zip(before, after, strict=True)
    ]
    assert drift["features"] == pytest.approx(sum(distances) / 5, rel=1e-5)
    assert drift["pictures"] == 5


def test_nothing_moved_and_nothing_seen() -> None:
    metric = PairedDrift(means)
    metric.update(pictures(0, 0), pictures(0, 0))
    assert metric.compute() == {}
    metric = PairedDrift(means)
    metric.update(pictures(2, 0), pictures(2, 0))
    drift = metric.compute()
    assert (drift["rmse"], drift["psnr"]) == (0, math.inf)
    assert drift["features"] == pytest.approx(0, abs=1e-12)
    plain = PairedDrift()
    plain.update(pictures(2, 0), pictures(2, 1))
    assert set(plain.compute()) == {"rmse", "psnr", "pictures"}


def unbiased_kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the kernel (xᵀy/d + 1)³ (Bińkowski et al., 2018), by loops."""
    n, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    same = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return same - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kid_equals_its_definition() -> None:
    before, after = ((pictures(6, seed) * 255).byte() for seed in (0, 1))
    after = after // 2
    metric = kernel_distance(means)
    metric.update(before, real=True)
    metric.update(after, real=False)
    found = compute_kernel_distance(metric)
    # Six pictures are fewer than a subset, so all subsets are alike but for their order.
    expected = unbiased_kid(means(before.float() / 255).double(), means(after.float() / 255).double())
    assert found["kid"] == pytest.approx(expected, rel=1e-4)
    assert found["kid_std"] < 1e-5 < found["kid"]


def test_kid_is_reproducible_and_leaves_the_global_state_alone() -> None:
    metric = kernel_distance(means)
    metric.update((pictures(80, 0) * 255).byte(), real=True)
    metric.update((pictures(80, 1).sqrt() * 255).byte(), real=False)
    state = torch.random.get_rng_state()
    first = compute_kernel_distance(metric)
    assert torch.equal(torch.random.get_rng_state(), state)
    metric._computed = None
    torch.manual_seed(5)
    assert compute_kernel_distance(metric) == first
    assert compute_kernel_distance(kernel_distance(means)) == {}


def test_inception_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lit-unlearn\[fid\]'"):
        kernel_distance(None)
